"""int8: rows with scales of their own, weights whose products no processor saturates, and what tuning gets to see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeprompt.base.dequantize import load_package_weights
from edgeprompt.base.load import load_base
from exporters.quantize.graph import SIGNED_7
from exporters.quantize.rows import quantize_rows

WIDTH, OUT = 4, 6


def row_quantized(opset: int, rows: str | None) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """x and z, each in a product of its own with the same weight and bias; the weight in float, the bias."""
    codes = np.random.default_rng(1).integers(-63, 64, (WIDTH, OUT)).astype(np.int8)  # no processor saturates
    tensors = {"w": codes, "s": np.full(OUT, 0.01, np.float32), "o": np.zeros(OUT, np.int8)}
    tensors["bias"] = np.arange(OUT, dtype=np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeMatMul", [name, "w", "s", "o", "bias"], [f"{name}_y"], domain="com.microsoft")
        for name in ("x", "z")
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, WIDTH]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["others", "more", WIDTH]),
        ],
        [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None) for name in ("x", "z")],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    quantize_rows(model)
    return ir.serde.serialize_model(model), codes * 0.01, tensors["bias"]


@pytest.mark.parametrize(
    ("opset", "rows", "divides"), [(21, "rows", False), (21, None, True), (20, "rows", True)], ids=str
)
def test_every_row_has_a_scale_of_its_own(opset: int, rows: str | None, divides: bool) -> None:
    model, weight, bias = row_quantized(opset, rows)
    assert ("Div" in {node.op_type for node in model.graph.node}) is divides
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = np.array([[0, 0, 0, 0], [1, -2, 0.5, 4], [1e4, -2e4, 5e3, 4e4], [1e-6, -2e-6, 5e-7, 4e-6]], np.float32)
    other = np.random.default_rng(2).normal(size=(2, 3, WIDTH)).astype(np.float32)
    found, others = session.run(None, {"x": given, "z": other})
    assert np.array_equal(found[0], bias)
    error = np.abs(found - bias - given @ weight)
    steps = np.abs(given).max(1, keepdims=True) / 127 * np.abs(weight).sum(0) + 1e-5
    assert (error <= steps).all()
    assert np.allclose(others, other @ weight + bias, atol=0.1)
    (alone, _) = session.run(None, {"x": given[3:], "z": other})
    assert np.array_equal(alone[0], found[3])


def test_two_products_fit_the_sixteen_bits_that_avx2_adds_them_in(encoder_package: Callable[..., Path]) -> None:
    assert 2 * 255 * SIGNED_7 < 1 << 15
    graph = onnx.load(encoder_package("BERT", "int8") / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(weights) == 2 * 6 + 2  # the layers, the pooler, and the head's transformation
    for name in weights:
        codes = numpy_helper.to_array(tensors[name])
        assert codes.dtype == np.int8
        assert np.abs(codes).max(0).tolist() == [SIGNED_7] * codes.shape[1]


def test_tuning_for_the_package_sees_its_weights(
    encoder_base: Callable[[str], Path], encoder_package: Callable[..., Path]
) -> None:
    loaded, plain = load_base(encoder_base("BERT")), load_base(encoder_base("BERT"))
    found = load_package_weights(loaded.model, encoder_package("BERT", "int8"))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert name in found.parameters
    before, after = (dict(one.model.named_parameters())[name].detach() for one in (plain, loaded))
    step = before.abs().amax(1, keepdim=True) / SIGNED_7
    assert torch.all((before - after).abs() <= step / 2 + 1e-6)
    assert not torch.equal(before, after)
