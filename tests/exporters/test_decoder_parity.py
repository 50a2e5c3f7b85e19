"""Every decoder family: the exported graph computes what PyTorch computes, and a broken one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeprompt import names
from edgeprompt.errors import ExportError, ValidationError
from edgeprompt.package import open_package
from exporters import export_model, validate_package
from exporters.families import known_families
from exporters.validate import DecoderGraph, reference_logits
from tests.exporters.decoder_models import CONFIGS, WINDOWED, loaded_decoder


def test_every_decoder_family_has_a_tiny_model() -> None:
    from exporters.families import find_family

    decoders = {name for name in known_families() if find_family(name).architecture == names.DECODER_ONLY}
    assert decoders == set(CONFIGS)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_torch_route_is_exact(model_type: str, tmp_path: Path) -> None:
    loaded = loaded_decoder(model_type)
    report = export_model(loaded, tmp_path / "package", route="torch")
    measured = report.validation
    # One pass, pieces on top of a past, a ragged batch; virtual rows in front and inside; a window exceeded.
    assert measured["comparisons"] == (13 if model_type in WINDOWED else 10)
    assert measured["max_difference"] < 1e-4 * measured["logit_scale"]
    assert measured["greedy_agreement"] == 1
    operators = [node.op_type for node in ir.load(tmp_path / "package" / "model.onnx").graph]
    assert operators.count("GroupQueryAttention") == report.manifest.geometry.num_layers
    # What stood in for attention, norms and positions is gone again.
    again = loaded_decoder(model_type).model
    ids = np.arange(5, 15, dtype=np.int64)
    rows = np.zeros((1, report.manifest.geometry.hidden_size), np.float32)
    assert np.array_equal(reference_logits(loaded.model, ids, rows), reference_logits(again, ids, rows))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_genai_route_is_exact(model_type: str, tmp_path: Path) -> None:
    report = export_model(loaded_decoder(model_type), tmp_path / "package")
    assert report.manifest.route == "genai"
    assert report.validation["max_difference"] < 1e-4 * report.validation["logit_scale"]
    assert (tmp_path / "package" / "genai_config.json").exists()


@pytest.mark.parametrize("model_type", WINDOWED)
def test_genai_route_refuses_what_it_would_write_wrong(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--route torch"):
        export_model(loaded_decoder(model_type), tmp_path / "package", route="genai")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom"])
def test_precisions(model_type: str, precision: str, tmp_path: Path) -> None:
    report = export_model(loaded_decoder(model_type), tmp_path / "package", route="torch", precision=precision)
    assert report.validation["mean_correlation"] > {"fp16": 0.9999, "int8": 0.99, "int4": 0.9}[precision]
    open_package(tmp_path / "package").verify()


def test_adapter_door_needs_no_prompt(tmp_path: Path) -> None:
    loaded = loaded_decoder("llama")
    package = export_model(loaded, tmp_path / "package", door="adapter").path
    graph = DecoderGraph(package, open_package(package).manifest)
    ids = np.arange(5, 12, dtype=np.int64)
    feeds = {names.INPUT_IDS: ids[None], names.ATTENTION_MASK: np.ones((1, 7), np.int64), **graph.empty_past()}
    logits = graph.session.run([names.LOGITS], feeds)[0][0, -1]
    want = reference_logits(loaded.model, ids, np.zeros((1, 64), np.float32))
    np.testing.assert_allclose(logits, want, atol=1e-4)


def test_a_wrong_package_is_refused(tmp_path: Path) -> None:
    loaded = loaded_decoder("gpt2")
    package = export_model(loaded, tmp_path / "package").path
    assert validate_package(package, against=loaded)["greedy_agreement"] == 1
    other = loaded_decoder("gpt2")
    # The embedding stays, so that the fingerprint does too: only the values can tell.
    other.model.transformer.h[1].mlp.c_fc.weight.data *= 1.5
    with pytest.raises(ValidationError, match="differ from PyTorch's"):
        validate_package(package, against=other)
