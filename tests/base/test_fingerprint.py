"""The base fingerprint: the same however a base is loaded, another for another base."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from edgeprompt.base.fingerprint import base_fingerprint

CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{**CONFIG, "intermediate_size": 96, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_does_not_matter(dtype):
    model = make()
    assert base_fingerprint(copy.deepcopy(model).to(dtype)) == base_fingerprint(model)


def test_the_head_does_not_matter(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert base_fingerprint(AutoModel.from_pretrained(tmp_path)) == base_fingerprint(model)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"vocab_size": 501}, {"num_hidden_layers": 3}])
def test_another_base_has_another(changes):
    assert base_fingerprint(make(**changes)) != base_fingerprint(make())
