"""Every quantised weight is made of the base's parameters, so that validation can read it back; another is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgeprompt import names
from edgeprompt.errors import ExportError
from edgeprompt.package.folder import open_package
from exporters import export_model
from exporters.quantize.graph import SIGNED_7, quantize_graph
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


@pytest.mark.parametrize("target", [names.NATIVE, names.WEB])
@pytest.mark.parametrize("precision", [*QUANTISED, "gguf"])
def test_layers_that_share_a_weight_share_its_integers(precision: str, target: str) -> None:
    """As in DeBERTa v3 and ALBERT, whose matrices are too large to be folded into a copy for each reader."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    weight = ir.Value(name="w", const_value=ir.tensor(layer.weight.detach().numpy(), name="w"))
    weight.shape, weight.type = ir.Shape((64, 64)), ir.TensorType(ir.DataType.FLOAT)
    texts = ir.Value(name="x", shape=ir.Shape((1, 3, 64)), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, value = [], texts
    for number in range(2):
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"t{number}")
        product = ir.node("MatMul", [value, turned.outputs[0]], name=f"m{number}")
        for node in (turned, product):
            node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_out", ir.DataType.FLOAT
        nodes += [turned, product]
        value = product.outputs[0]
    value.shape = ir.Shape((1, 3, 64))
    graph = ir.Graph([texts], [value], nodes=nodes, initializers=[weight], opset_imports={"": 21}, name="shared")
    model = ir.Model(graph, ir_version=10)
    stored = {"weight": "Q4_0"}
    records = quantize_graph(model, precision, layer, levels=SIGNED_7, stored=stored, target=target)
    assert [record["pieces"] for record in records] == [[("weight", 64, False)]]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = np.random.default_rng(0).normal(size=(1, 3, 64)).astype(np.float32)
    found = session.run(None, {"x": given})[0]
    matrix = layer.weight.detach().numpy().T
    wanted = given @ matrix @ matrix
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


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
