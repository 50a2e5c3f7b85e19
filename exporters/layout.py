"""Where a package's graphs and weights lie: under our names or under transformers.js', in files that fit the web."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from edgeprompt import names
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import UnsupportedError
from edgeprompt.package.files import sha256_file
from edgeprompt.package.outputs import HUB_GRAPH
from exporters.contract import HUB_LAYOUT, BuiltGraphs, ExportOptions

WEB_FILE = 64 << 20
"""Bytes of weights in one file of a web package (one larger matrix stays whole): a cut transfer loses little, and hosts
of static files take it."""
HUB = "onnx"
"""Folder of graphs in transformers.js' layout."""
HUB_NAMES = {"fp32": "model", "fp16": "model_fp16", "int8": "model_quantized", "int4": "model_q4"}
"""Precision -> the name of a decoder's graph in transformers.js' layout, below `onnx/`."""
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_ALIGNMENT = 64
_COPIED = 1 << 22
"""Bytes that are copied at a time."""


def check_layout(options: ExportOptions, loaded: LoadedBase) -> None:
    """Refuse what transformers.js could not run.

    Raises:
        UnsupportedError: layout "hub" for an architecture or precision that has no name there.
    """
    if options.layout != HUB_LAYOUT:
        return
    if loaded.family.architecture != names.DECODER_ONLY:
        raise UnsupportedError(
            f"layout 'hub' is for {names.DECODER_ONLY} bases, and {loaded.name!r} is {loaded.family.architecture}: "
            "transformers.js does not feed these graphs' inputs; leave out --layout"
        )
    if options.precision not in HUB_NAMES:
        raise UnsupportedError(f"layout 'hub' has no name for precision {options.precision!r}: {', '.join(HUB_NAMES)}")


def arrange(built: BuiltGraphs, folder: Path, options: ExportOptions, loaded: LoadedBase) -> BuiltGraphs:
    """Give the files in `folder` their names and sizes.

    In transformers.js' layout, a second graph reads the same weights. Its prompt input has a default, since
    transformers.js feeds none.
    """
    hub = options.layout == HUB_LAYOUT
    most = WEB_FILE if options.target == names.WEB else None
    if not hub and most is None:
        return built
    if not hub:
        for file in built.graphs.values():
            _place_data(folder / file, f"{file}.data", most)
        return built
    (file,) = built.graphs.values()
    twin = f"{HUB}/{HUB_NAMES[options.precision]}.onnx"
    (folder / HUB).mkdir()
    files = _place_data(folder / file, f"{twin}_data", most)
    _write_twin(folder / file, folder / twin)
    name = Path(twin).name
    _write_configs(folder, loaded, {"dtype": _DTYPES[options.precision], "use_external_data_format": {name: files}})
    extra = {**built.extra, HUB_GRAPH: {"file": twin, "sha256": sha256_file(folder / twin)}}
    return dataclasses.replace(built, extra=extra)


def data_files(graph: Path) -> list[str]:
    """Names of the files that hold a graph's external data, in order, beside it."""
    proto = onnx.load(graph, load_external_data=False)
    return list(dict.fromkeys(info.location for _, info in _external(proto)))


def _place_data(graph: Path, location: str, most: int | None) -> int:
    """Move a graph's data to `location` (and `location_1` ...), in files of at most `most` bytes; how many they are.

    One tensor that has more stays whole. Data that fits into one file stays as it is, so that its hash is that of the
    same weights elsewhere.
    """
    proto = onnx.load(graph, load_external_data=False)
    external = list(_external(proto))
    if not external:
        return 0
    data = graph.parent / external[0][1].location
    if most is None or data.stat().st_size <= most:
        for tensor, info in external:
            _place(tensor, location, info.offset or 0, info.length)
        data.rename(graph.parent / location)
        count = 1
    else:
        count = _split(external, data, graph.parent, location, most)
    onnx.save(proto, graph)
    return count


def _write_twin(graph: Path, twin: Path) -> None:
    """The same graph in its own folder, on the same data, with a default for the prompt's rows."""
    proto = onnx.load(graph, load_external_data=False)
    for tensor, info in _external(proto):
        _place(tensor, Path(info.location).relative_to(HUB).as_posix(), info.offset or 0, info.length)
    prompt = next(value for value in proto.graph.input if value.name == names.PROMPT_EMBEDDINGS)
    if all(tensor.name != prompt.name for tensor in proto.graph.initializer):
        width = prompt.type.tensor_type.shape.dim[1].dim_value
        rows = onnx.numpy_helper.from_array(np.zeros((1, width), np.float32), prompt.name)
        proto.graph.initializer.append(rows)
    onnx.save(proto, twin)


def _split(
    external: list[tuple[onnx.TensorProto, ExternalDataInfo]], data: Path, folder: Path, first: str, most: int
) -> int:
    """Copy each stretch of a data file into the file that its tensors will name; several tensors may share one."""
    stretches: dict[tuple[int, int], list[onnx.TensorProto]] = {}
    for tensor, info in external:
        stretches.setdefault((info.offset or 0, info.length), []).append(tensor)
    locations: list[str] = []
    end = 0
    target = None
    with data.open("rb") as source:
        for (offset, length), tensors in sorted(stretches.items()):
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            if target is None or (start and start + length > most):
                if target is not None:
                    target.close()
                locations.append(f"{first}_{len(locations)}" if locations else first)
                target = (folder / f"{locations[-1]}.new").open("wb")
                start = 0
            target.seek(start)
            source.seek(offset)
            for piece in _pieces(source, length):
                target.write(piece)
            end = start + length
            for tensor in tensors:
                _place(tensor, locations[-1], start, length)
    if target is not None:
        target.close()
    data.unlink()  # before a new file takes its name
    for location in locations:
        (folder / f"{location}.new").rename(folder / location)
    return len(locations)


def _pieces(source: Any, length: int) -> Iterator[bytes]:
    while length:
        piece = source.read(min(length, _COPIED))
        if not piece:
            raise OSError("the weights' file is shorter than its graph says")
        length -= len(piece)
        yield piece


def _external(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, ExternalDataInfo]]:
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor):
            yield tensor, ExternalDataInfo(tensor)


def _place(tensor: onnx.TensorProto, location: str, offset: int, length: int | None) -> None:
    del tensor.external_data[:]
    values = {"location": location, "offset": offset, **({} if length is None else {"length": length})}
    for key, value in values.items():
        tensor.external_data.add(key=key, value=str(value))


def _write_configs(folder: Path, loaded: LoadedBase, transformers_js: dict[str, Any]) -> None:
    """The base's config.json, with what transformers.js reads of a repository, and its generation_config.json."""
    config = json.loads(loaded.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(loaded.model).__name__]
    config["transformers.js_config"] = transformers_js
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    written = getattr(loaded.model, "generation_config", None)
    if written is not None:
        (folder / GENERATION_CONFIG).write_text(written.to_json_string(), "utf-8")
