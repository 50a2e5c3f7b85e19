"""Fusions that pay at decode time, when a graph of small matrices is limited by the number of its nodes.

Neither torch's exporter nor ONNX Runtime does these for graphs with GroupQueryAttention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.graft.linears import is_constant

_MS = "com.microsoft"


def fuse_graph(model: ir.Model) -> None:
    """Apply all fusions in place; none changes a result by more than the order of a sum."""
    model.opset_imports.setdefault(_MS, 1)
    for fusion in (_drop_round_trips, _pack_projections, _skip_norms):
        fusion(model.graph)
        drop_unused(model.graph)


def _drop_round_trips(graph: ir.Graph) -> None:
    """Reshape after Reshape that gives the first one's operand back: heads split and joined again."""
    for node in list(graph):
        first = _producer(node, 0, "Reshape")
        if node.op_type != "Reshape" or first is None:
            continue
        source, result = first.inputs[0], node.outputs[0]
        if source is not None and source.shape is not None and source.shape == result.shape and _named(source.shape):
            _replace_uses(result, source)


def _pack_projections(graph: ir.Graph) -> None:
    """One product for queries, keys and values: GroupQueryAttention takes them packed."""
    for node in list(graph):
        if node.op_type != "GroupQueryAttention" or node.inputs[1] is None:
            continue
        parts = node.inputs[:3]
        split = parts[0].producer() if parts[0] is not None else None
        if split is not None and split.op_type == "Split" and list(split.outputs) == list(parts):
            packed = split.inputs[0]
        else:
            packed = _joined(graph, node, parts)
        if packed is not None:
            node.replace_input_with(0, packed)
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)


def _joined(graph: ir.Graph, attention: ir.Node, parts: tuple[ir.Value | None, ...]) -> ir.Value | None:
    products, biases = [], []
    for part in parts:
        node = part.producer() if part is not None else None
        bias = None
        if node is not None and node.op_type == "Add":
            bias = next((value for value in node.inputs if value is not None and is_constant(graph, value)), None)
            other = next((value for value in node.inputs if value is not bias), None)
            node = other.producer() if other is not None else None
        if node is None or node.op_type != "MatMul" or node.inputs[1] is None:
            return None
        if not is_constant(graph, node.inputs[1]) or (bias is not None and len(bias.shape or ()) != 1):
            return None
        products.append(node)
        biases.append(bias)
    if len({id(node.inputs[0]) for node in products}) != 1 or len({bias is None for bias in biases}) != 1:
        # Whisper-like models leave the key's bias out; they are left alone.
        return None
    source, first = products[0].inputs[0], products[0]
    weights = [node.inputs[1] for node in products]
    packed = ir.node("MatMul", [source, _concatenated(graph, f"{first.name}_qkv_weight", weights, 1)])
    out = packed.outputs[0]
    out.name, out.dtype = f"{first.name}_qkv", first.outputs[0].dtype
    packed.name = out.name
    # In front of the attention every operand has been computed.
    graph.insert_before(attention, packed)
    if biases[0] is not None:
        add = ir.node("Add", [out, _concatenated(graph, f"{first.name}_qkv_bias", biases, 0)])
        add.name = add.outputs[0].name = f"{first.name}_qkv_biased"
        add.outputs[0].dtype = out.dtype
        graph.insert_before(attention, add)
        out = add.outputs[0]
    return out


def _skip_norms(graph: ir.Graph) -> None:
    """Add, then a root-mean-square norm of the sum: one node that gives both."""
    for norm in list(graph):
        add = _producer(norm, 0, "Add")
        if norm.op_type != "SimplifiedLayerNormalization" or add is None:
            continue
        left, right = add.inputs
        total, normed = add.outputs[0], norm.outputs[0]
        if left is None or right is None or left.shape is None or left.shape != right.shape or len(left.shape) != 3:
            continue
        if total.is_graph_output() or is_constant(graph, left) or is_constant(graph, right):
            continue
        epsilon = norm.attributes["epsilon"].value
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [left, right, norm.inputs[1]],
            {"epsilon": epsilon},
            domain=_MS,
            num_outputs=4,
            name=norm.name,
        )
        for old, new in ((normed, fused.outputs[0]), (total, fused.outputs[3])):
            new.name, new.dtype, new.shape = f"{old.name}_fused", old.dtype, old.shape
        # Everything that uses the sum comes behind the Add; the norm need not.
        graph.insert_after(add, fused)
        _replace_uses(normed, fused.outputs[0])
        _replace_uses(total, fused.outputs[3], skip=fused)


def _concatenated(graph: ir.Graph, name: str, values: list[ir.Value | None], axis: int) -> ir.Value:
    tensors = [value.const_value for value in values if value is not None and value.const_value is not None]
    shape = list(tensors[0].shape.numpy())
    shape[axis] = sum(tensor.shape.numpy()[axis] for tensor in tensors)

    def evaluate() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=axis), name=name)

    lazy = ir.LazyTensor(evaluate, dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name)
    joined = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(lazy.dtype), const_value=lazy)
    graph.register_initializer(joined)
    return joined


def _producer(node: ir.Node, at: int, op_type: str) -> ir.Node | None:
    value = node.inputs[at] if len(node.inputs) > at else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _named(shape: ir.Shape) -> bool:
    """Whether no dimension is unknown: two unknown dimensions only look equal."""
    return all(isinstance(dim, int) or dim.value is not None for dim in shape)


def _replace_uses(old: ir.Value, new: ir.Value, skip: ir.Node | None = None) -> None:
    for user, at in list(old.uses()):
        if user is not skip:
            user.replace_input_with(at, new)


def drop_unused(graph: ir.Graph) -> None:
    """Remove nodes and initialisers that nothing reads."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.inputs:
            del graph.initializers[name]
