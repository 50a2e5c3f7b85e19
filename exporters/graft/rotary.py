"""Rotary tables that ONNX Runtime computes when it loads a graph, where they would be a large part of the package.

A table is the cosine or sine of position times frequency. Gemma 3 270M has four of 32,768 rows, 67 MB in float32 beside
290 MB of weights. ONNX Runtime folds the nodes that compute one while it opens a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.graft.fuse import drop_unused

SHARE = 0.08
"""Of all initialisers: smaller tables are stored, since computing them takes time whenever a package is loaded."""
CLOSE = 5e-7
"""Largest difference from the stored table: a few roundings in float32 of a number up to 1."""
_INPUTS = {7: "Cos", 8: "Sin"}
"""Which inputs of GroupQueryAttention hold the tables, and what computes them."""

Floats = npt.NDArray[np.float32]


def compute_tables(model: ir.Model, torch_model: Any) -> int:
    """Replace rotary tables by the nodes that compute them, in place, where they are large and come out the same.

    Every table is computed by ONNX Runtime here, whole, and compared with what was stored.

    Returns:
        How many bytes of initialisers went.
    """
    graph = model.graph
    tables: dict[str, tuple[ir.Value, str]] = {}
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        for at, function in _INPUTS.items():
            value = node.inputs[at] if len(node.inputs) > at else None
            if value is not None and value.name in graph.initializers and value.const_value is not None:
                tables[str(value.name)] = (value, function)
    total = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    if sum(value.const_value.nbytes for value, _ in tables.values() if value.const_value is not None) < SHARE * total:
        return 0
    went = 0
    for value, function in tables.values():
        assert value.const_value is not None
        stored = value.const_value.numpy()
        for frequencies, factor in _candidates(torch_model, stored.shape):
            nodes, constants = _nodes(str(value.name), len(stored), frequencies, factor, function)
            if float(np.abs(_run(nodes, constants) - stored).max()) <= CLOSE:
                _replace(graph, value, nodes, constants)
                went += stored.nbytes
                break
    drop_unused(graph)
    return went


def _candidates(torch_model: Any, shape: tuple[int, ...]) -> Iterator[tuple[Floats, float]]:
    """Frequencies that the base has for tables of this width, and what it multiplies the tables by."""
    for module in torch_model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and tuple(buffer.shape) == shape[1:]:
                factor = getattr(module, f"{name.removesuffix('inv_freq')}attention_scaling", 1.0)
                yield buffer.float().numpy(), float(factor)


def _nodes(
    stem: str, positions: int, frequencies: Floats, factor: float, function: str
) -> tuple[list[ir.Node], list[ir.Value]]:
    """What computes one table [positions, frequencies], the last node's output, and the constants that it reads."""
    arrays = {
        "first": np.array(0, np.float32),
        "positions": np.array(positions, np.float32),
        "step": np.array(1, np.float32),
        "column": np.array([1], np.int64),
        "frequencies": np.ascontiguousarray(frequencies[None]),
        "factor": np.array(factor, np.float32),
    }
    constants = {}
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=f"{stem}_{name}")
        constants[name] = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    nodes: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(operator, list(inputs), name=f"{stem}_{operator.lower()}_{len(nodes)}")
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.FLOAT
        nodes.append(node)
        return node.outputs[0]

    counted = add("Range", constants["first"], constants["positions"], constants["step"])
    angles = add("Mul", add("Unsqueeze", counted, constants["column"]), constants["frequencies"])
    table = add(function, angles)
    if factor != 1:
        add("Mul", table, constants["factor"])
    nodes[-1].outputs[0].shape = ir.Shape([positions, len(frequencies)])
    used = {value for node in nodes for value in node.inputs}
    return nodes, [value for value in constants.values() if value in used]


def _run(nodes: list[ir.Node], constants: list[ir.Value]) -> Floats:
    """The table as ONNX Runtime computes it."""
    import onnxruntime as ort

    graph = ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, initializers=constants, opset_imports={"": 20}, name="g")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (table,) = session.run(None, {})
    for node in nodes:
        graph.remove(node)
    for value in constants:
        del graph.initializers[str(value.name)]
    graph.outputs.clear()
    found: Floats = table
    return found


def _replace(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node], constants: list[ir.Value]) -> None:
    for constant in constants:
        graph.register_initializer(constant)
    graph.insert_before(next(iter(graph)), nodes)
    ir.convenience.replace_all_uses_with(value, nodes[-1].outputs[0])
