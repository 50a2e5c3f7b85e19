"""Head sizes: GroupQueryAttention takes multiples of 8, and rotates multiples of 16."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgeprompt.base.families import find_family
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import EdgePromptError, UnsupportedError
from exporters import export_model

SIZES = {
    "vocab_size": 200, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def base(model_type, head_size):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, hidden_size=2 * head_size, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return LoadedBase("tiny", model, None, find_family(model_type))


@pytest.mark.parametrize("route", ["auto", "genai", "torch"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "bloom"])
def test_no_multiple_of_8_is_refused_in_words(model_type, route, tmp_path):
    with pytest.raises(UnsupportedError, match=r"heads of 20 .*multiples of 8"):
        export_model(base(model_type, 20), tmp_path / "p", route=route)
    assert not (tmp_path / "p").exists()


def test_heads_of_24_rotate_before_the_operator(tmp_path):
    assert export_model(base("llama", 24), tmp_path / "p").manifest.route == "torch"
    with pytest.raises(EdgePromptError, match=r"multiples of 16.*--route torch"):
        export_model(base("llama", 24), tmp_path / "q", route="genai")
