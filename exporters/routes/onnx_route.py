"""The onnx route: virtual tokens on graphs that others exported, without touching their weights."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeprompt import names
from edgeprompt.base.fingerprint import fingerprint_of, sampled_rows
from edgeprompt.base.generation import generation_of
from edgeprompt.base.geometry import geometry_of, text_config, tokens_of
from edgeprompt.base.graph_file import is_linked, read_graph
from edgeprompt.base.load import LoadedBase, load_base, read_tokenizer
from edgeprompt.base.rope import check_rope
from edgeprompt.errors import BaseMismatchError, EdgePromptError, ExportError, SourceError
from edgeprompt.package.manifest import Base, Geometry, Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.contract import ExportOptions
from exporters.decoder_only import save_graph
from exporters.graft.virtual_tokens import expose_hidden_states, find_embedding, graft_virtual_tokens
from exporters.package import hash_graphs, hash_tokenizer, tool_versions, write_tokenizer
from exporters.routes.onnx_seq2seq import MERGE_INPUT, make_seq2seq, split_merged
from exporters.routes.onnx_source import GENAI_CONFIG, OnnxSource, find_source, graph_precision, has_half
from exporters.validate.onnx_base import compare_with_base
from exporters.validate.onnx_graphs import check_encoder_decoder, check_single
from exporters.validate.quality import with_quality

_SCALED = ("gemma", "bart", "bigbird_pegasus", "blenderbot", "m2m_100", "mbart", "nllb", "pegasus_x", "plbart", "xglm")
"""Families whose embedding module scales what it looks up; prompt rows join behind that."""


def build_package(
    base: str | os.PathLike[str] | LoadedBase,
    folder: Path,
    options: ExportOptions,
    prompts: Mapping[str, PromptFile],
    *,
    against: str | os.PathLike[str] | LoadedBase | None = None,
) -> Manifest:
    """Graft the graphs of BASE and write them into `folder`.

    Args:
        base: A folder of somebody's export, or one `.onnx` file of it.
        folder: The package's folder.
        options: `precision` chooses among a folder's variants; nothing is quantised.
        prompts: Prompt files to validate with.
        against: The base in PyTorch; without it the package is compared with the ungrafted graphs alone.

    Raises:
        SourceError: no graphs, or a quantised embedding without `against` (it does not give the fingerprint).
        ExportError: a graph that cannot be grafted; says what was looked for and what was found.
        ValidationError: the package does not compute what the graphs, or the base, compute.
    """
    if isinstance(base, LoadedBase):
        raise SourceError("the onnx route takes a folder of graphs, not a loaded model")
    source = find_source(Path(base), options.precision)
    loaded = load_base(against) if isinstance(against, (str, os.PathLike)) else against
    try:
        return _package(source, folder, options, prompts, loaded)
    except EdgePromptError:
        raise
    except Exception as error:  # a broken graph or config can fail anywhere in onnx_ir and transformers
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"cannot use the graphs in {str(source.folder)!r}: {type(error).__name__}: {reason}"
        ) from error


def _package(
    source: OnnxSource,
    folder: Path,
    options: ExportOptions,
    prompts: Mapping[str, PromptFile],
    loaded: LoadedBase | None,
) -> Manifest:
    config = loaded.config if loaded else text_config(source.config)
    check_rope(config, source.folder.name)
    geometry = geometry_of(config)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        built = _build(source, folder, options, config, geometry, Path(scratch))
        manifest = _manifest(source, built, folder, options, loaded, config, geometry, Path(scratch))
        for prompt in prompts.values():
            prompt.check_base(manifest)
        manifest.write(folder)
        check = check_encoder_decoder if len(built.originals) > 1 else check_single
        measured = check(built.originals, folder, manifest, built.after_scale, built.half, Path(scratch))
    if loaded is not None:
        against = compare_with_base(loaded, folder, manifest, tuple(prompts.values()), options.data)
        manifest = with_quality(manifest, against, allow=options.allow_quality_loss)
        measured["against_base"] = manifest.validation
    return dataclasses.replace(manifest, validation=measured)


@dataclasses.dataclass(frozen=True)
class _Built:
    architecture: str
    graphs: Mapping[str, str]
    """Manifest key -> file in the package."""
    originals: Mapping[str, Path]
    """The graphs that the package must agree with: "model", or "encoder", "first" and "next"."""
    precision: str
    kv_dtype: str
    half: bool
    """Whether weights are in half precision, quantised or not."""
    fused: bool
    after_scale: bool
    table: npt.NDArray[Any] | None
    """Sampled rows of an unquantised embedding."""


def _build(
    source: OnnxSource, folder: Path, options: ExportOptions, config: Any, geometry: Geometry, scratch: Path
) -> _Built:
    originals = _unmerged(source, scratch)
    models = {key: _load(path) for key, path in originals.items()}
    precision = graph_precision(models.values())
    main = models.get("model") or models["encoder"]
    after_scale = config.model_type.startswith(_SCALED) and _has_scale(main)
    table = _sample(main, geometry)
    if table is None and (sibling := source.unquantised()) is not None:
        table = _sample(_load(sibling), geometry)
    if "model" in models:
        architecture = _architecture(main, source.graphs["model"])
        if architecture == names.DECODER_ONLY:
            expose_hidden_states(main, geometry.hidden_size)
    else:
        architecture = names.ENCODER_DECODER
        models = make_seq2seq(models, geometry)
        main = models["encoder"]
    width = geometry.embedding_size or geometry.hidden_size
    graft_virtual_tokens(
        main,
        vocab_size=geometry.vocab_size,
        hidden_size=width,
        after_scale=after_scale,
        prompt_input=options.prompt_input,
    )
    graphs = {}
    for key, model in models.items():
        graphs[key] = f"{key}.onnx"
        save_graph(model, folder / graphs[key])
    cache = next(
        (v for model in models.values() for v in model.graph.inputs if (v.name or "").startswith("past")), None
    )
    return _Built(
        architecture,
        graphs,
        originals,
        precision,
        "float16" if cache is not None and cache.dtype == ir.DataType.FLOAT16 else "float32",
        any(has_half(model) for model in models.values()),
        any(node.op_type == "GroupQueryAttention" for node in main.graph.all_nodes()),
        after_scale,
        table,
    )


def _unmerged(source: OnnxSource, scratch: Path) -> dict[str, Path]:
    """The source's graphs: those whose data is linked copied, merged decoders taken apart."""
    graphs = {key: _unlinked(path, scratch) for key, path in source.graphs.items()}
    if "merged" in graphs:
        return {"encoder": graphs["encoder"], **split_merged(graphs["merged"], scratch)}
    if "model" in graphs and any(value.name == MERGE_INPUT for value in _load(graphs["model"]).graph.inputs):
        return {"model": split_merged(graphs["model"], scratch)["next"]}
    return graphs


def _unlinked(path: Path, scratch: Path) -> Path:
    """The graph itself, or a copy that ONNX Runtime loads where external data is a link (a hub cache's, for one)."""
    model = _load(path)
    if not is_linked(path):
        return path
    copy = scratch / "unlinked" / path.name
    copy.parent.mkdir(exist_ok=True)
    ir.save(model, copy, external_data=f"{path.name}.data")
    return copy


def _load(path: Path) -> ir.Model:
    try:
        return read_graph(path)
    except EdgePromptError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise families of their own
        raise SourceError(f"cannot read graph {str(path)!r}: {' '.join(str(error).split())[:200]}") from error


def _architecture(model: ir.Model, path: Path) -> str:
    inputs = {value.name for value in model.graph.inputs}
    outputs = {value.name for value in model.graph.outputs}
    if {names.past(0, "key"), names.LOGITS} <= inputs | outputs:
        return names.DECODER_ONLY
    if names.LAST_HIDDEN_STATE in outputs:
        return names.ENCODER_ONLY
    raise ExportError(
        f"{path.name} is neither a decoder with a cache (past_key_values.0.key in, logits out) nor an encoder "
        f"(last_hidden_state out): inputs {', '.join(sorted(map(str, inputs))[:8])}, outputs "
        f"{', '.join(sorted(map(str, outputs))[:8])}; export it with-past, or with task feature-extraction"
    )


def _has_scale(model: ir.Model) -> bool:
    _, rows = find_embedding(model)
    users = [node for node, _ in rows.uses()]
    return len(users) == 1 and users[0].op_type == "Mul"


def _sample(model: ir.Model, geometry: Geometry) -> npt.NDArray[Any] | None:
    lookup, _ = find_embedding(model)
    table = lookup.inputs[0]
    tensor = table.const_value if table is not None else None
    if lookup.op_type != "Gather" or tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    rows = tensor.numpy()
    if len(rows) < geometry.vocab_size:
        raise BaseMismatchError(
            f"the graph's embedding has {len(rows)} rows, the config says vocab_size {geometry.vocab_size}"
        )
    return np.asarray(rows[sampled_rows(geometry.vocab_size)])


def _manifest(
    source: OnnxSource,
    built: _Built,
    folder: Path,
    options: ExportOptions,
    loaded: LoadedBase | None,
    config: Any,
    geometry: Geometry,
    scratch: Path,
) -> Manifest:
    if loaded is not None:
        base = loaded.base
        _check_same_base(built, config, geometry, loaded)
    elif built.table is not None:
        base = Base(source.folder.resolve().name, fingerprint_of(config.model_type, geometry, built.table))
    else:
        raise SourceError(
            "the graph's embedding is quantised, which does not give the base's fingerprint, and no unquantised graph "
            "lies beside it: give --against BASE, the model that was exported"
        )
    tokenizer = read_tokenizer(str(source.folder), source.folder) or (loaded.tokenizer if loaded else None)
    written = _generation_config(source.folder)
    if written is None and loaded is not None:
        written = getattr(loaded.model, "generation_config", None)
    generation, notes = generation_of(config, written, built.architecture)
    if (source.folder / GENAI_CONFIG).is_file() and built.graphs.get("model") == "model.onnx":
        (folder / GENAI_CONFIG).write_bytes((source.folder / GENAI_CONFIG).read_bytes())
    return Manifest(
        architecture=built.architecture,
        model_type=config.model_type,
        base=base,
        geometry=geometry,
        tokens=tokens_of(config, written, tokenizer),
        precision=built.precision,
        route="onnx",
        graphs=hash_graphs(built.graphs, folder),
        tokenizer_fingerprint=write_tokenizer(
            tokenizer, folder, scratch, vocab_size=geometry.vocab_size, base=base.name
        ),
        tokenizer_sha256=hash_tokenizer(folder),
        prompt_input=options.prompt_input,
        kv_dtype=built.kv_dtype,
        kv_in_place=built.fused,
        generation=generation,
        versions=tool_versions(),
        extra={
            **({"generation_notes": notes} if notes else {}),
            "source_graphs": {key: path.name for key, path in source.graphs.items()},
        },
    )


def _check_same_base(built: _Built, config: Any, geometry: Geometry, loaded: LoadedBase) -> None:
    if built.table is None:
        return
    found = fingerprint_of(config.model_type, geometry, built.table)
    if not Base(loaded.name, found).matches(loaded.base):
        raise BaseMismatchError(
            f"the graph's embedding gives fingerprint {found}, --against {loaded.name!r} has {loaded.base.brief}"
        )


def _generation_config(folder: Path) -> Any | None:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
