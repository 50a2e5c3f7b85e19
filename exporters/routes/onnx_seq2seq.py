"""Optimum's encoder-decoder graphs, rearranged: cross-attention keys and values move to the encoder's graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeprompt import names
from edgeprompt.errors import ExportError
from edgeprompt.package.manifest import Geometry

MERGE_INPUT = "use_cache_branch"
"""Input by which a merged decoder chooses its branch."""


def split_merged(path: Path, folder: Path) -> dict[str, Path]:
    """Write the two branches of a merged decoder into `folder` as "first" (no past) and "next" (with one).

    Raises:
        ExportError: no merged decoder of Optimum's.
    """
    written = {}
    for key, branch in (("first", "else_branch"), ("next", "then_branch")):
        model = ir.load(path)
        take_branch(model, branch, path.name)
        written[key] = folder / f"split_{key}.onnx"
        ir.save(model, written[key], external_data=f"split_{key}.onnx.data")
    return written


def take_branch(model: ir.Model, branch: str, name: str) -> None:
    """Make a branch of the graph's only If the whole graph, in place.

    Raises:
        ExportError: the graph is not one If on `use_cache_branch`.
    """
    graph = model.graph
    chosen = [node for node in graph if node.op_type == "If"]
    flag = next((value for value in graph.inputs if value.name == MERGE_INPUT), None)
    if len(chosen) != 1 or flag is None:
        raise ExportError(f"{name} is no merged decoder: expected one If on {MERGE_INPUT}, found {len(chosen)}")
    inner = chosen[0].attributes[branch].as_graph()
    outputs = list(inner.outputs)
    nodes, initializers = list(inner), list(inner.initializers.values())
    by_name = {value.name: value for value in graph.outputs}
    types = {name: (value.shape, value.type) for name, value in by_name.items()}
    positions = [value.name for value in chosen[0].outputs]
    for key, attribute in chosen[0].attributes.items():
        if key != branch:  # the other branch must not keep alive what only it uses
            for node in attribute.as_graph().all_nodes():
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)
    graph.outputs[:] = []
    graph.remove(chosen[0])
    chosen[0].replace_input_with(0, None)
    inner.outputs[:] = []
    for value in initializers:
        inner.initializers.pop(value.name or "")
        graph.register_initializer(value)
    inner.remove(nodes)
    graph.extend(nodes)
    for value, outer in zip(outputs, positions, strict=True):
        value.name = outer
        value.shape, value.type = types.get(outer, (value.shape, value.type))
    graph.outputs[:] = [value for value in outputs if value.name in by_name]
    graph.sort()  # the pass goes backwards
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]


def make_seq2seq(models: Mapping[str, ir.Model], geometry: Geometry) -> dict[str, ir.Model]:
    """The contract's two graphs from Optimum's three.

    Args:
        models: "encoder", "first" (the decoder without a past) and "next" (with one).
        geometry: For the number of layers.

    Raises:
        ExportError: a graph lacks an input or output of Optimum's naming.
    """
    encoder, first, later = models["encoder"], models["first"], models["next"]
    states = _output(encoder, names.LAST_HIDDEN_STATE, "encoder_model")
    states.name = names.ENCODER_HIDDEN_STATES
    parts = [(layer, part) for layer in range(geometry.num_layers) for part in ("key", "value")]
    cross = [_output(first, f"present.{layer}.encoder.{part}", "decoder_model") for layer, part in parts]
    _append(encoder, first, cross, states)
    for value, (layer, part) in zip(cross, parts, strict=True):
        value.name = names.cross_present(layer, part)
    encoder.graph.outputs[:] = [states, *cross]
    inputs = {value.name: value for value in later.graph.inputs}
    for layer, part in parts:
        for old, new in (
            (f"past_key_values.{layer}.decoder.{part}", names.past(layer, part)),
            (f"past_key_values.{layer}.encoder.{part}", names.cross_past(layer, part)),
        ):
            if old not in inputs:
                raise ExportError(f"decoder_with_past_model has no input {old}; it has {', '.join(map(str, inputs))}")
            inputs[old].name = new
        _output(later, f"present.{layer}.decoder.{part}", "decoder_with_past_model").name = names.present(layer, part)
    kept = {names.LOGITS, *(names.present(layer, part) for layer, part in parts)}
    later.graph.outputs[:] = [value for value in later.graph.outputs if value.name in kept]
    return {"encoder": encoder, "decoder": later}


def _output(model: ir.Model, name: str, graph: str) -> ir.Value:
    for value in model.graph.outputs:
        if value.name == name:
            return value
    there = ", ".join(str(value.name) for value in model.graph.outputs)
    raise ExportError(f"{graph} has no output {name}; it has {there}")


def _append(encoder: ir.Model, first: ir.Model, wanted: list[ir.Value], states: ir.Value) -> None:
    """Move the part of `first` that computes `wanted` from the encoder's states into the encoder's graph."""
    given = next((value for value in first.graph.inputs if value.name == names.ENCODER_HIDDEN_STATES), None)
    if given is None:
        raise ExportError(f"decoder_model has no input {names.ENCODER_HIDDEN_STATES}")
    # The batch size is read off the decoder's own hidden states; the encoder's have it too. Anything else that their
    # shape was read for would show in the comparison with `first`.
    others = {value for value in first.graph.inputs if value is not given}
    for node in first.graph:
        if not others.isdisjoint(node.inputs):
            if node.op_type == "Shape":
                node.replace_input_with(0, given)
            else:
                others.update(node.outputs)
    if not others.isdisjoint(wanted):
        raise ExportError("cross-attention keys and values of decoder_model need more than the encoder's states")
    first.graph.outputs[:] = wanted
    RemoveUnusedNodesPass()(first)
    for user, index in list(given.uses()):
        user.replace_input_with(index, states)
    initializers = list(first.graph.initializers.values())
    nodes = list(first.graph)
    for value in (*initializers, *(output for node in nodes for output in node.outputs)):
        if value.name and value not in wanted:
            value.name = f"cross/{value.name}"
    first.graph.outputs[:] = []
    for value in initializers:
        first.graph.initializers.pop(value.name or "")
        encoder.graph.register_initializer(value)
    first.graph.remove(nodes)
    for node in nodes:
        node.name = f"cross/{node.name}"
    encoder.graph.extend(nodes)
    for domain, version in first.graph.opset_imports.items():
        encoder.graph.opset_imports.setdefault(domain, version)
