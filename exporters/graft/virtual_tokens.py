"""Grafts virtual tokens onto a graph: ids at or above vocab_size index rows of the input `prompt_embeddings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeprompt import names
from edgeprompt.errors import ExportError

_LOOKUPS = ("Gather", "GatherBlockQuantized")
_IDS = 1
"""Which input of a look-up holds the ids."""
_WAY = ("Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze")
"""What other exporters put between `input_ids` and the look-up."""
_PREFIX = "virtual"
_SELECTIONS = ("Gather", "Slice", "Squeeze", "Unsqueeze")
"""How exporters take the last position, whose logits alone are needed."""
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulBnb4", "DynamicQuantizeMatMul")
"""What an output layer is; its first input is the state that the logits are computed from."""


def graft_virtual_tokens(
    model: ir.Model, *, vocab_size: int, hidden_size: int, after_scale: bool = False, prompt_input: str = "required"
) -> None:
    """Add the `prompt_embeddings` input to a graph, in place, at the node that looks `input_ids` up.

    Args:
        model: A graph from any exporter.
        vocab_size: The first virtual id.
        hidden_size: Width of an embedding row.
        after_scale: Whether the embedding table's own scale (Gemma) comes before the rows join: prompt rows take the
            place of what the embedding *module* returns.
        prompt_input: "required": the new input must be fed; "optional": it has a default of one zero row, so that stock
            ORT can feed it from an adapter file.

    Raises:
        ExportError: no node, or more than one, looks `input_ids` up.
    """
    graph = model.graph
    lookup, rows = find_embedding(model)
    ids = lookup.inputs[_IDS]
    assert ids is not None
    lookups = _lookups(next(value for value in graph.inputs if value.name == names.INPUT_IDS))
    if after_scale:
        rows = find_scaled(rows)
    dtype = rows.dtype or ir.DataType.FLOAT
    rows.dtype = dtype

    prompt = ir.Input(
        names.PROMPT_EMBEDDINGS,
        shape=ir.Shape(["prompt_rows", hidden_size]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    graph.inputs.append(prompt)
    if prompt_input == "optional":
        prompt.const_value = ir.tensor(np.zeros((1, hidden_size), np.float32), name=names.PROMPT_EMBEDDINGS)
        graph.register_initializer(prompt)
    first = _constant(graph, "first_id", np.array(vocab_size, np.int64))
    zero = _constant(graph, "zero", np.array(0, np.int64))
    last_axis = _constant(graph, "last_axis", np.array([-1], np.int64))

    before: list[ir.Node] = []
    is_virtual = _node(before, "GreaterOrEqual", [ids, first], "is_virtual", ir.DataType.BOOL)
    token_ids = _node(before, "Where", [is_virtual, zero, ids], "token_ids", ir.DataType.INT64)
    offset = _node(before, "Sub", [ids, first], "offset", ir.DataType.INT64)
    row_ids = _node(before, "Where", [is_virtual, offset, zero], "row_ids", ir.DataType.INT64)
    prompt_rows = _node(before, "Gather", [prompt, row_ids], "prompt_rows", ir.DataType.FLOAT, axis=0)
    if dtype != ir.DataType.FLOAT:
        prompt_rows = _node(before, "Cast", [prompt_rows], "prompt_rows_cast", dtype, to=dtype)
    mask = _node(before, "Unsqueeze", [is_virtual, last_axis], "mask", ir.DataType.BOOL)
    graph.insert_before(lookup, before)
    for node in lookups:
        node.replace_input_with(_IDS, token_ids)

    users = list(rows.uses())
    joined: list[ir.Node] = []
    output = _node(joined, "Where", [mask, prompt_rows, rows], "embeddings", dtype)
    producer = rows.producer()
    assert producer is not None
    graph.insert_after(producer, joined)
    for node, index in users:
        node.replace_input_with(index, output)


def find_embedding(model: ir.Model) -> tuple[ir.Node, ir.Value]:
    """The node that looks `input_ids` up, and the float rows it gives (behind a dequantisation, where there is one).

    Other exporters reshape or cast the ids on the way, and store the table in eight bits.

    Raises:
        ExportError: no node, or more than one; the message says what reads `input_ids`.
    """
    ids = next((value for value in model.graph.inputs if value.name == names.INPUT_IDS), None)
    found = [] if ids is None else [node for node in _lookups(ids) if not _reads_scales(node)]
    if len(found) != 1:
        readers = "no such input" if ids is None else ", ".join(sorted({node.op_type for node, _ in ids.uses()}))
        raise ExportError(
            f"expected one embedding node ({' or '.join(_LOOKUPS)}) that reads {names.INPUT_IDS}, found {len(found)} "
            f"(what reads it: {readers or 'nothing'}); a graph with fused embeddings has to be exported without them"
        )
    lookup = found[0]
    rows = lookup.outputs[0]
    if ids is not None and (scales := [node for node in _lookups(ids) if node is not lookup]):
        return lookup, _scaled_rows(scales[0])
    source = lookup.inputs[2] if lookup.op_type == "GatherBlockQuantized" else lookup.inputs[0]
    users = [node for node, _ in rows.uses()]
    if len(users) == 1 and users[0].op_type == "DequantizeLinear":
        rows, source = users[0].outputs[0], users[0].inputs[1]
    if rows.dtype is None and source is not None:
        rows.dtype = source.dtype  # the table's, or its scales': exporters need not state inner types
    return lookup, rows


def expose_hidden_states(model: ir.Model, hidden_size: int) -> None:
    """Make the output layer's input a graph output, `hidden_states` float32, for heads in the output layer's place.

    It is there at every position where the last one is only taken right in front of the output layer, else at the
    positions of the logits. A graph whose output layer is not found keeps its outputs as they are.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    logits = outputs.get(names.LOGITS)
    if logits is None or names.HIDDEN_STATES in outputs:
        return
    ids = next(value for value in model.graph.inputs if value.name == names.INPUT_IDS)
    layer = output_layer(logits)
    if layer is None:
        return
    value = selected(layer.state)
    reference = logits.shape if value is layer.state else ids.shape
    producer = value.producer() if value is not None else None
    if value is None or producer is None or value.is_graph_output():
        return
    if value.dtype != ir.DataType.FLOAT:  # half, or not stated by the exporter
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{_PREFIX}/{names.HIDDEN_STATES}")
        model.graph.insert_after(producer, cast)
        value = cast.outputs[0]
        value.dtype = ir.DataType.FLOAT
    value.name = names.HIDDEN_STATES
    value.shape = ir.Shape([*reference[:2], hidden_size] if reference is not None else [None, None, hidden_size])
    model.graph.outputs.append(value)


@dataclass(frozen=True)
class OutputLayer:
    """The product that gives the logits, and the state that it reads."""

    node: ir.Node
    state: ir.Value | None


def output_layer(logits: ir.Value) -> OutputLayer | None:
    """The product behind whose result, perhaps through elementwise nodes, the logits are; None if there is none."""
    value: ir.Value | None = logits
    while value is not None:
        node = value.producer()
        if node is None or not node.inputs:
            return None
        value = node.inputs[0]
        if node.op_type in _PRODUCTS:
            return OutputLayer(node, value)
        if node.op_type == "MatMulInteger":
            quantised = value.producer() if value is not None else None
            return OutputLayer(node, quantised.inputs[0] if quantised is not None else None)
    return None


def selected(value: ir.Value | None) -> ir.Value | None:
    """What the last position is taken from, where `value` is that; else `value` itself."""
    while value is not None and (taken := value.producer()) is not None and taken.op_type in _SELECTIONS:
        value = taken.inputs[0]
    return value


def _lookups(ids: ir.Value) -> list[ir.Node]:
    found = []
    for node, index in ids.uses():
        if node.op_type in _LOOKUPS and index == _IDS:
            found.append(node)
        elif node.op_type in _WAY and index == 0:
            found += _lookups(node.outputs[0])
    return found


def _reads_scales(node: ir.Node) -> bool:
    """Whether a look-up gives each row's scale, beside another that gives the row's integers."""
    table = node.inputs[0]
    return node.op_type == "Gather" and table is not None and table.shape is not None and len(table.shape) == 1


def _scaled_rows(scales: ir.Node) -> ir.Value:
    """The rows that looked-up scales are multiplied into."""
    value = scales.outputs[0]
    while True:
        (node, _), *_others = value.uses()
        value = node.outputs[0]
        if node.op_type == "Mul":
            return value


def find_scaled(rows: ir.Value) -> ir.Value:
    """The rows behind the embedding's own scale.

    Raises:
        ExportError: there is no scale.
    """
    users = [node for node, _ in rows.uses()]
    if len(users) == 1 and users[0].op_type == "Mul":
        scaled = users[0].outputs[0]
        scaled.dtype = rows.dtype
        return scaled
    raise ExportError(f"expected the embedding's scale (Mul) behind the lookup, found {[n.op_type for n in users]}")


def _constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    tensor = ir.tensor(value, name=f"{_PREFIX}/{name}")
    constant = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(constant)
    return constant


def _node(
    into: list[ir.Node], op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, **attributes: Any
) -> ir.Value:
    values = {key: int(value) for key, value in attributes.items()}
    node = ir.node(op_type, inputs, values, name=f"{_PREFIX}/{name}")
    node.outputs[0].name = f"{_PREFIX}/{name}"
    node.outputs[0].dtype = dtype
    into.append(node)
    return node.outputs[0]
