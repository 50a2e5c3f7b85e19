"""Exports decoder-only models: one graph, with logits of the last position."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeprompt import names
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.base.memory import Sizes, check_memory, to_observe
from edgeprompt.errors import ExportError, InputError, UnsupportedError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.contract import CALIBRATED, HUB_LAYOUT, BuiltGraphs, ExportOptions
from exporters.graft.fuse import drop_unused
from exporters.graft.kept_logits import keep_logits
from exporters.graft.rotary import compute_tables
from exporters.graft.virtual_tokens import expose_hidden_states, graft_virtual_tokens
from exporters.quantize.graph import BLOCK, FOUR_BITS, quantize_graph
from exporters.quantize.observe import MOST_PARAMETERS, Observed, observe
from exporters.validate.decoder import validate_decoder

GRAPH = "model.onnx"
_LOG = logging.getLogger("edgeprompt")


def build(loaded: LoadedBase, options: ExportOptions, folder: Path, scratch: Path) -> BuiltGraphs:
    """Build, quantise, graft and write the graph.

    Raises:
        ExportError: the route cannot build this model.
        UnsupportedError: the model's embeddings or positions do not fit the graph contract.
    """
    from exporters.routes import genai, torch_route

    head_size = geometry_of(loaded.config).head_size
    if head_size % 8:
        raise UnsupportedError(
            f"{loaded.name!r} has heads of {head_size} values: ONNX Runtime's GroupQueryAttention takes multiples of "
            "8; choose another base"
        )
    route, instead = options.route, {}
    if route == "auto":
        route = "genai" if genai.suits(loaded) else "torch"
        if genai.is_built(loaded) and (reason := genai.obstacle(loaded)) is not None:
            instead = {"route_instead_of_genai": f"the genai route cannot: {reason}"}
    builder = genai.build_graph if route == "genai" else torch_route.build_graph
    try:
        model = builder(loaded, options, folder, scratch)
    except ExportError as error:
        if route == options.route or route == "torch":
            raise
        instead = {"route_instead_of_genai": str(error)}
        route, model = "torch", torch_route.build_graph(loaded, options, folder, scratch)
    finish_graph(model, loaded, options, scratch)
    save_graph(model, folder / GRAPH)
    return BuiltGraphs({"model": GRAPH}, route, extra={"weights": model.meta["weights"], **instead})


def finish_graph(model: ir.Model, loaded: LoadedBase, options: ExportOptions, scratch: Path | None = None) -> None:
    """What every route's graph goes through, in place: contract shapes, quantisation, virtual tokens.

    With `scratch`, a folder that must outlive the graph, quantised weights lie there.
    """
    geometry = geometry_of(loaded.config)
    width = loaded.model.get_input_embeddings().weight.shape[1]
    if width != geometry.hidden_size:
        raise UnsupportedError(
            f"{loaded.name!r} projects embeddings of {width} to its hidden size {geometry.hidden_size}: soft prompts "
            "need both to be one size, so choose a base where they are"
        )
    _name_shapes(model, geometry.num_key_value_heads, geometry.head_size)
    expose_hidden_states(model, geometry.hidden_size)
    keep_logits(model, geometry.vocab_size)
    model.meta["weights"] = quantize_graph(
        model,
        options.precision,
        loaded.model,
        block_size=options.block_size,
        stored=loaded.stored,
        scratch=scratch,
        target=options.target,
        unsigned=options.layout == HUB_LAYOUT,
        observed=_observed(loaded, options),
    )
    compute_tables(model, loaded.model)
    graft_virtual_tokens(
        model,
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        after_scale=hasattr(loaded.model.get_input_embeddings(), "embed_scale"),
        prompt_input=options.prompt_input,
    )


def _observed(loaded: LoadedBase, options: ExportOptions) -> Observed | None:
    """What calibration texts tell of the base; None: they are not looked at.

    Raises:
        InputError: the user gave some for nothing.
        CapacityError: memory is too small to look at them.
    """
    why = why_uncalibrated(loaded, options.precision, options.block_size)
    if why is None:
        closely = options.precision == "int4" or _parameters(loaded) <= MOST_PARAMETERS
        if closely:
            check_memory(loaded.name, Sizes(_parameters(loaded)), to_observe)
        return observe(loaded, options.calibration, closely=closely, virtual=options.precision == "int8")
    if options.calibration is not None:
        raise InputError(f"{why}, without calibration texts; leave them out")
    if options.precision == "int4" and options.block_size == BLOCK and _parameters(loaded) > MOST_PARAMETERS:
        _LOG.warning("note: %s, without calibration texts", why)
    return None


def why_uncalibrated(loaded: LoadedBase, precision: str, block_size: int) -> str | None:
    """Why an export of a decoder looks at no calibration texts; None: it does."""
    if precision not in CALIBRATED or block_size != BLOCK:
        return f"{precision} in blocks of {block_size} is made of the weights alone"
    if precision != "int4":
        return None
    table = loaded.model.get_input_embeddings().weight
    matrices = {name for name, one in loaded.model.named_parameters() if one.dim() == 2 and one is not table}
    nearest = "int4 rounds its weights to the nearest"
    if loaded.stored and all(loaded.stored.get(name) in FOUR_BITS for name in matrices):
        return f"{loaded.name!r} has 4 bits already: {nearest}"
    if _parameters(loaded) > MOST_PARAMETERS:
        return f"{loaded.name!r} has more than {MOST_PARAMETERS // 10**6} million parameters: {nearest}"
    return None


def _parameters(loaded: LoadedBase) -> int:
    return sum(parameter.numel() for parameter in loaded.model.parameters())


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph and, beside it, all of its weights (protobuf ends at 2 GB, external data does not)."""
    model.graph.sort()
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    written = ir.load(path)
    if _share_reshaped(written):
        ir.save(written, path)


def _share_reshaped(model: ir.Model) -> bool:
    """Reshape stored weights on disk: one entry on the bytes for each shape that the graph reads; whether any was.

    ONNX Runtime would compute the Reshape when it loads the graph, and keep a copy.
    """
    found = False
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Reshape" else None
        stored = value.const_value if value is not None else None
        shape = ir.convenience.get_const_tensor(node.inputs[1]) if isinstance(stored, ir.ExternalTensor) else None
        if value is None or not isinstance(stored, ir.ExternalTensor) or shape is None:
            continue
        old, alone = node.outputs[0], len(value.uses()) == 1
        name = str(value.name if alone else old.name)
        view = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            stored.dtype,
            shape=ir.Shape(stored.numpy().reshape(shape.numpy()).shape),
            name=name,
            base_dir=stored.base_dir,
        )
        new = ir.Value(name=name, shape=view.shape, type=ir.TensorType(view.dtype), const_value=view)
        ir.convenience.replace_all_uses_with(old, new)
        model.graph.remove(node, safe=True)
        if alone:
            del model.graph.initializers[name]
        model.graph.register_initializer(new)
        found = True
    drop_unused(model.graph)
    return found


def validate(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
) -> Mapping[str, Any]:
    """Compare the package with the base.

    Raises:
        ValidationError: it does not compute what the base computes.
    """
    return validate_decoder(loaded, folder, manifest, prompts, data)


def _name_shapes(model: ir.Model, kv_heads: int, head_size: int) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name.startswith(names.PAST_KEY_VALUES):
            value.shape = ir.Shape(["batch_size", kv_heads, "past_sequence_length", head_size])
        elif name.startswith("present."):
            value.shape = ir.Shape(["batch_size", kv_heads, "total_sequence_length", head_size])
