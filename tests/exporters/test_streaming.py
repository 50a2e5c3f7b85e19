"""An export that reads its base's matrices one by one writes what one with the base in memory writes, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgeprompt.base.load import load_base
from exporters import export_model
from tests.support.decoder_models import tiny_decoder


@pytest.mark.parametrize(
    ("family", "route", "precision"),
    [
        ("llama", "genai", "int4"),
        ("gpt2", "torch", "int8"),
        pytest.param("gemma3_text", "torch", "int4", marks=pytest.mark.slow),  # six layers, traced twice
        ("qwen2", "torch", "fp32"),
    ],
)
def test_the_same_bytes_as_from_memory(family: str, route: str, precision: str, tmp_path: Path) -> None:
    tiny_decoder(family).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    streamed, plain = (
        export_model(base, tmp_path / name, precision=precision, route=route, allow_quality_loss=True)
        for base, name in ((tmp_path / "base", "streamed"), (load_base(tmp_path / "base"), "plain"))
    )
    assert streamed.manifest.weights_hash == plain.manifest.weights_hash
    assert streamed.manifest.graphs == plain.manifest.graphs
    assert not [path for path in tmp_path.iterdir() if path.name not in ("base", "streamed", "plain")]
    differences = [report.validation["max_difference"] for report in (streamed, plain)]
    assert differences[0] == pytest.approx(differences[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_matrices_that_a_tracer_never_sees(precision: str, tmp_path: Path) -> None:
    """Large enough that torch.onnx is given zeros in their place."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=1000, hidden_size=768, intermediate_size=800, num_hidden_layers=1, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    streamed, plain = (
        export_model(base, tmp_path / name, precision=precision, route="torch", allow_quality_loss=True)
        for base, name in ((tmp_path / "base", "streamed"), (load_base(tmp_path / "base"), "plain"))
    )
    assert streamed.manifest.weights_hash == plain.manifest.weights_hash
