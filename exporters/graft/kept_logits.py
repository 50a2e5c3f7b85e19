"""Lets a graph give logits of the last few positions: the input `logits_to_keep` and the output `kept_logits`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeprompt import names
from exporters.graft.virtual_tokens import output_layer, selected

_PREFIX = "kept"
_END = np.iinfo(np.int64).max


def keep_logits(model: ir.Model, vocab_size: int) -> bool:
    """Give a graph that computes logits of the last position alone those of the last few, in place.

    The output layer then runs on the last `logits_to_keep` positions, and `logits` stays what it was: the last of them.
    The input has a default of 1, so whoever does not know it (ONNX Runtime GenAI, stock ONNX Runtime) notices nothing.

    Args:
        model: A decoder graph from any exporter.
        vocab_size: Width of the logits.

    Returns:
        Whether it could be done: False where logits are there at every position anyway, or where the output layer or
        the way in which the last position is taken is not found.
    """
    graph = model.graph
    place = next((at for at, value in enumerate(graph.outputs) if value.name == names.LOGITS), None)
    if place is None or any(value.name == names.LOGITS_TO_KEEP for value in graph.inputs):
        return False
    logits = graph.outputs[place]
    layer = output_layer(logits)
    hidden = selected(layer.state) if layer is not None else None
    if layer is None or layer.state is None or hidden is None or hidden is layer.state or logits.shape is None:
        return False
    if logits.shape[1] != 1:
        return False
    batch, producer = logits.shape[0], logits.producer()
    assert producer is not None
    count = ir.Input(names.LOGITS_TO_KEEP, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    count.const_value = ir.tensor(np.array([1], np.int64), name=names.LOGITS_TO_KEEP)
    graph.inputs.append(count)
    graph.register_initializer(count)
    end, axis, last = (_constant(graph, name, value) for name, value in (("end", _END), ("axis", 1), ("last", -1)))
    first = ir.node("Neg", [count], name=f"{_PREFIX}/first")
    first.outputs[0].dtype = ir.DataType.INT64
    states = ir.node("Slice", [hidden, first.outputs[0], end, axis], name=f"{_PREFIX}/states")
    states.outputs[0].dtype = layer.state.dtype
    old = layer.state
    graph.insert_before(layer.node, [first, states])
    ir.convenience.replace_all_uses_with(old, states.outputs[0])
    _forget_shapes(states.outputs[0], logits)
    logits.name, logits.shape = names.KEPT_LOGITS, ir.Shape([batch, names.LOGITS_TO_KEEP, vocab_size])
    taken = ir.node("Slice", [logits, last, end, axis], name=f"{_PREFIX}/{names.LOGITS}")
    value = taken.outputs[0]
    value.name, value.dtype, value.shape = names.LOGITS, logits.dtype, ir.Shape([batch, 1, vocab_size])
    graph.insert_after(producer, taken)
    graph.outputs[place] = value
    graph.outputs.append(logits)
    return True


def _forget_shapes(value: ir.Value, end: ir.Value) -> None:
    """What stands between the states and the logits has as many positions as are kept, not one."""
    for node, _ in value.uses():
        for output in node.outputs:
            if output is not end:
                output.shape = None
                _forget_shapes(output, end)


def _constant(graph: ir.Graph, name: str, value: int) -> ir.Value:
    tensor = ir.tensor(np.array([value], np.int64), name=f"{_PREFIX}/{name}")
    constant = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(constant)
    return constant
