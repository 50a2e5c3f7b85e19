"""Scaled rotary positions: `--route auto` takes the route that computes them."""

import pytest
import torch

from edgeprompt.errors import ExportError
from exporters import export_model

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", SCALED)
def test_auto_exports_what_the_builder_cannot(kind, save_tiny, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        initializer_range=0.2, rope_parameters={"rope_theta": 10000.0, **SCALED[kind]},
    )  # fmt: skip
    report = export_model(save_tiny(LlamaForCausalLM(config)), tmp_path / "out")
    assert report.manifest.route == "torch"


def test_auto_goes_on_to_torch_and_says_so(tiny_llama_base, tmp_path, monkeypatch):
    from exporters.routes import genai

    def fail(*_):
        raise ExportError("the genai builder cannot write this")

    monkeypatch.setattr(genai, "build_graph", fail)
    report = export_model(tiny_llama_base, tmp_path / "out")
    assert report.manifest.route == "torch"
    assert "cannot write this" in report.manifest.extra["route_instead_of_genai"]
    with pytest.raises(ExportError, match="cannot write this"):
        export_model(tiny_llama_base, tmp_path / "other", route="genai")
