"""int4 of float bases: rounding that makes up for its errors, and 8 bits for the matrices that lose most."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprompt.base.blockwise import quantize_affine, quantize_blocks
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import CapacityError, InputError
from exporters import decoder_only, export_model
from exporters.quantize import graph as quantizer
from exporters.quantize.feedback import moments, quantize_affine_fed
from exporters.quantize.observe import observe
from tests.support import decoder_models


def nearest(weight: torch.Tensor) -> torch.Tensor:
    blocks, offsets = quantize_affine(weight)
    stored = quantize_blocks(torch.nn.functional.pad(offsets, (0, -offsets.shape[1] % 32)), bits=4).dequantize()
    return blocks.dequantize() + stored[:, : offsets.shape[1]].repeat_interleave(32, dim=1)


def fed(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    blocks, offsets = quantize_affine_fed(weight, moments(inputs))
    found = offsets.dequantize()[:, : weight.shape[1] // 32]
    return blocks.dequantize() + found.repeat_interleave(32, dim=1)


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs of which a few directions hold most."""
    few = torch.randn(tokens, columns // 8) @ torch.randn(columns // 8, columns)
    return few + 0.3 * torch.randn(tokens, columns)


@pytest.mark.parametrize("columns", [64, 1056])  # 33 blocks have offsets of two steps
def test_products_of_other_inputs_move_less(columns: int) -> None:
    torch.manual_seed(0)
    inputs, weight = correlated(4 * columns, columns), torch.randn(48, columns)
    seen, others = inputs[: 2 * columns], inputs[2 * columns :]
    errors = [float((others @ (found - weight).T).norm()) for found in (fed(weight, seen), nearest(weight))]
    assert errors[0] < 0.6 * errors[1]


def test_no_weight_is_moved_far() -> None:
    torch.manual_seed(0)
    inputs, weight = correlated(256, 64), torch.randn(48, 64)
    inputs[:, 5] *= 1000  # others would follow it anywhere
    steps = (weight.reshape(48, 2, 32).amax(2) - weight.reshape(48, 2, 32).amin(2)) / 15
    moved = (fed(weight, inputs) - weight).abs() / steps.repeat_interleave(32, dim=1)
    assert float(moved.max()) < 5


def test_what_lies_on_a_grid_stays() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (48, 2, 32)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = ((codes - 8) * 0.25).flatten(1)
    assert torch.equal(fed(weight, correlated(256, 64)), weight)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_what_a_change_will_cost_is_known_before(family: str) -> None:
    """Small random changes of a matrix, and the KL divergence that gradients foretell."""
    loaded: LoadedBase = decoder_models.loaded_decoder(family)
    observed = observe(loaded, closely=True)
    name = next(name for name in observed.inputs if "layers.1" in name or "h.1" in name)
    parameter = dict(loaded.model.named_parameters())[name]
    weight = parameter.detach().T if family == "gpt2" else parameter.detach()
    pieces = [(name, len(weight), family == "gpt2")]
    torch.manual_seed(1)
    change = 0.02 * weight.std() * torch.randn_like(weight)
    inputs = observed.inputs_of(pieces)
    assert inputs is not None
    told = observed.divergence((observed.gradients_of(pieces) * (inputs @ change.T)).sum(1))
    ids = torch.randint(3, 500, (64, 24))
    with torch.no_grad():
        want = torch.log_softmax(loaded.model(ids).logits, -1)
        parameter += change.T if family == "gpt2" else change
        got = torch.log_softmax(loaded.model(ids).logits, -1)
    true = float((want.exp() * (want - got)).sum(-1).mean())
    assert true / 3 < told < true * 3  # one draw for each of 16 short texts


def test_the_matrix_that_loses_most_has_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "EIGHT_BITS", 0.12)  # one matrix of the two layers
    loaded: LoadedBase = decoder_models.loaded_decoder("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        weight = dict(loaded.model.named_parameters())[name]
        weight *= 8
        weight[:, ::16] *= 12  # the others of a block have few steps
    manifest = export_model(loaded, tmp_path / "package", precision="int4", allow_quality_loss=True).manifest
    eight = {record["pieces"][0][0] for record in manifest.extra["weights"] if record["bits"] == 8}
    assert eight - {"lm_head.weight", "model.embed_tokens.weight"} == {name}


def test_a_large_base_is_not_observed(
    tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoder_only, "MOST_PARAMETERS", 1000)
    texts = tmp_path / "texts.txt"
    texts.write_text("Some words.\nMore words.", "utf-8")
    options: dict[str, Any] = {"precision": "int4", "allow_quality_loss": True}
    with pytest.raises(InputError, match="rounds its weights to the nearest"):
        export_model(tiny_llama_base, tmp_path / "package", calibration=texts, **options)
    with caplog.at_level(logging.WARNING, "edgeprompt"):
        export_model(tiny_llama_base, tmp_path / "package", **options)
    assert "rounds its weights to the nearest" in caplog.text


def test_too_little_memory_is_said_before_the_work(
    tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_only, "to_observe", lambda _: 1e15)
    with pytest.raises(CapacityError, match="needs about 1000000"):
        export_model(tiny_llama_base, tmp_path / "package", precision="int4", allow_quality_loss=True)
    assert not (tmp_path / "package").exists()


def test_calibration_changes_int4(tiny_llama_base: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Some words.\nMore words.", "utf-8")
    options: dict[str, Any] = {"precision": "int4", "allow_quality_loss": True}
    first = export_model(tiny_llama_base, tmp_path / "first", **options).manifest
    again = export_model(tiny_llama_base, tmp_path / "again", **options).manifest
    other = export_model(tiny_llama_base, tmp_path / "other", calibration=texts, **options).manifest
    assert first.weights_hash == again.weights_hash
    assert first.weights_hash != other.weights_hash
