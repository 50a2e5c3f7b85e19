"""ONNX graphs from folders whose files are links, as a hub cache lays them out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from edgeprompt.errors import SourceError


def read_graph(path: Path) -> ir.Model:
    """Load a graph; its external data may be symbolic or hard links, which `onnx_ir` alone rejects.

    Raises:
        SourceError: external data lies outside the graph's folder by its name, or is no regular file.
    """
    model = ir.load(path)
    for value, tensor in _external(model):
        file = _data_file(path, tensor)
        value.const_value = ir.ExternalTensor(
            os.path.realpath(file),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            base_dir="",  # without one, onnx_ir does not look for links; _data_file has looked
        )
    return model


def is_linked(path: Path) -> bool:
    """Whether external data of the graph is a symbolic link or has several hard links; `onnx` and others refuse it."""
    files = {_data_file(path, tensor) for _, tensor in _external(ir.load(path))}
    return any(file.is_symlink() or file.stat().st_nlink > 1 for file in files)


def _external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value


def _data_file(path: Path, tensor: ir.ExternalTensor) -> Path:
    location = str(tensor.location)
    file = path.parent / location
    if os.path.isabs(location) or ".." in Path(location).parts:
        raise SourceError(
            f"{path.name}: external data {location!r} lies outside the base directory; export the graph again"
        )
    if not file.is_file():
        raise SourceError(f"{path.name}: its external data {location!r} is not there; download that file too")
    return file
