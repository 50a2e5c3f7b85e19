"""Rotary tables that are computed at load: the same numbers, and only where that pays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from exporters.graft import rotary


class _Rotary(torch.nn.Module):
    def __init__(self, frequencies: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("local_inv_freq", frequencies)
        self.local_attention_scaling = scaling


def _graph(cos: np.ndarray, sin: np.ndarray, weights: int) -> ir.Model:
    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        shape = ir.Shape(tensor.shape)
        return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

    x = ir.Input("x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    values = [constant("cos", cos), constant("sin", sin), constant("w", np.zeros(weights, np.float32))]
    inputs = [x, *[None] * 6, *values[:2], values[2]]
    node = ir.node("GroupQueryAttention", inputs, {"num_heads": 1}, domain="com.microsoft")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=values, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def _tables(frequencies: torch.Tensor, positions: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    angles = torch.arange(positions).float()[:, None] * frequencies[None]
    return (angles.cos() * scaling).numpy(), (angles.sin() * scaling).numpy()


@pytest.mark.parametrize("scaling", [1.0, 1.19])
def test_large_tables_are_computed_to_the_last_position(scaling: float) -> None:
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    cos, sin = _tables(frequencies, 32768, scaling)
    model = _graph(cos, sin, 1000)
    assert rotary.compute_tables(model, _Rotary(frequencies, scaling)) == cos.nbytes + sin.nbytes
    assert not {"cos", "sin"} & set(model.graph.initializers)
    (attention,) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert [attention.inputs[at].shape.numpy() for at in (7, 8)] == [(32768, 32)] * 2
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < 5000
    ir.to_proto(model)


def test_other_tables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    cos, sin = _tables(frequencies, 512, 1.0)
    changed = cos.copy()
    changed[500, 3] += 1e-3
    model = _graph(changed, sin, 10)
    assert rotary.compute_tables(model, _Rotary(frequencies, 1.0)) == sin.nbytes  # one number is another
    assert "cos" in model.graph.initializers
    assert rotary.compute_tables(_graph(cos, sin, 10), _Rotary(frequencies * 1.001, 1.0)) == 0
    assert rotary.compute_tables(_graph(cos, sin, 1 << 20), _Rotary(frequencies, 1.0)) == 0  # small beside the rest
