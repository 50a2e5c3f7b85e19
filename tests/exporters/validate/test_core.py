"""Judging of comparisons, where values are unusual."""

import json
import math

import numpy as np
import pytest

from exporters import export_model
from exporters.validate.core import Tally, correlation


@pytest.mark.parametrize(("one", "other", "found"), [([0, 0], [0, 0], 1), ([0, 0], [1, 2], 0), ([1, 2], [3, 5], 1)])
def test_values_that_do_not_vary_have_a_correlation(one, other, found):
    got, want = np.array(one, np.float32), np.array(other, np.float32)
    assert correlation(got, want) == pytest.approx(found)
    assert correlation(want, got) == pytest.approx(found)
    tally = Tally()
    tally.add(got, want)
    assert json.dumps(tally.report(), allow_nan=False)


def test_a_first_token_without_an_embedding_is_no_traceback(save_tiny, tmp_path):
    """Its logits are all zero; the report held NaN, which no manifest takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, pad_token_id=1, initializer_range=0.2))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    report = export_model(save_tiny(model), tmp_path / "package")
    assert not math.isnan(report.validation["least_correlation"])
