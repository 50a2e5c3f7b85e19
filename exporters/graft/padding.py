"""Padding as a bias on the scores of attention: WebGPU's kernels read that, and no `key_padding_mask`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeprompt import names
from edgeprompt.errors import ExportError

_PREFIX = "padding"
_MASK, _BIAS = 4, 5
"""Inputs of MultiHeadAttention."""
_FILTER = -10000.0
"""The operator's default for what a masked score gets."""


def padding_as_bias(model: ir.Model) -> None:
    """Give every MultiHeadAttention an `attention_bias` in place of its `key_padding_mask`, in place.

    A mask `[batch_size, total_length]` of ones and zeros becomes `[batch_size, 1, sequence_length, total_length]` of
    zeros and what the operator adds where there is padding; a bias that is there already is added to it. Layers that
    read the same mask share it.

    Raises:
        ExportError: an attention has a mask, and the graph no `input_ids`.
    """
    graph = model.graph
    made: dict[tuple[ir.Value, ir.Value | None], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "MultiHeadAttention" or len(node.inputs) <= _MASK or node.inputs[_MASK] is None:
            continue
        mask, old = node.inputs[_MASK], node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
        assert mask is not None
        if (mask, old) not in made:
            value = node.attributes.get_float("mask_filter_value", _FILTER)
            made[mask, old] = _insert_bias(graph, node, mask, old, value, f"{_PREFIX}/{len(made)}")
        node.resize_inputs(max(len(node.inputs), _BIAS + 1))
        node.replace_input_with(_MASK, None)
        node.replace_input_with(_BIAS, made[mask, old])


def _insert_bias(
    graph: ir.Graph, before: ir.Node, mask: ir.Value, old: ir.Value | None, filtered: float, stem: str
) -> ir.Value:
    ids = next((value for value in graph.inputs if value.name == names.INPUT_IDS), None)
    if ids is None:
        raise ExportError(f"the graph masks padding and has no input {names.INPUT_IDS}, whose length the bias needs")
    nodes: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes, name=f"{stem}/{len(nodes)}_{operator.lower()}")
        node.outputs[0].name = node.name
        nodes.append(node)
        return node.outputs[0]

    def constant(name: str, array: Any) -> ir.Value:
        value = ir.Value(name=f"{stem}/{name}", const_value=ir.tensor(array, name=f"{stem}/{name}"))
        graph.register_initializer(value)
        return value

    one = constant("one", np.array([1], np.int64))
    kept = add("Cast", mask, to=int(ir.DataType.FLOAT))
    lacking = add("Sub", constant("ones", np.array(1, np.float32)), kept)
    scores = add("Mul", lacking, constant("filter", np.array(filtered, np.float32)))
    flat = add("Unsqueeze", scores, constant("axes", np.array([1, 2], np.int64)))
    length = add("Shape", ids, start=1, end=2)
    bias = add("Expand", flat, add("Concat", one, one, length, one, axis=0))
    if old is not None:
        bias = add("Add", bias, old)
    bias.dtype = ir.DataType.FLOAT
    graph.insert_before(before, nodes)
    return bias
