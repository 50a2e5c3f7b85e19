"""Every quantised weight is made of the base's parameters, so that validation can read it back; another is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from edgeprompt.errors import ExportError
from edgeprompt.package.folder import open_package
from exporters import export_model
from exporters.quantize.graph import quantize_graph
from tests.support import decoder_models, encoder_models, seq2seq_models

DECODERS = sorted(decoder_models.CONFIGS)
QUANTISED = ["int4", "int8"]


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_weight_of_no_parameter_is_refused(tmp_path: Path, precision: str) -> None:
    loaded = decoder_models.loaded_decoder("llama")
    export_model(loaded, tmp_path / "package", route="torch", precision="fp32")
    graph = ir.external_data.load_to_model(ir.load(open_package(tmp_path / "package").graph("model")))
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5  # as if an exporter had changed the graph's
    with pytest.raises(ExportError, match="made of no parameters of the base"):
        quantize_graph(graph, precision, loaded.model)


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("route", ["auto", "torch"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoders(tmp_path: Path, family: str, route: str, precision: str) -> None:
    loaded = decoder_models.loaded_decoder(family)
    export_model(loaded, tmp_path / "package", route=route, precision=precision, allow_quality_loss=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("family", sorted(encoder_models.CONFIGS))
def test_encoders(encoder_base: Callable[[str], Path], tmp_path: Path, family: str, precision: str) -> None:
    export_model(encoder_base(family), tmp_path / "package", precision=precision, allow_quality_loss=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("family", sorted(seq2seq_models.CONFIGS))
def test_encoder_decoders(seq2seq_base: Callable[[str], Path], tmp_path: Path, family: str, precision: str) -> None:
    export_model(seq2seq_base(family), tmp_path / "package", precision=precision, allow_quality_loss=True)
