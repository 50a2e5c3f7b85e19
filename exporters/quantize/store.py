"""Quantised weights on disk while a graph is made: memory holds one of them at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_SMALL = 1 << 16
"""Bytes up to which an array stays in memory."""


class Store:
    """A file of arrays in a folder that somebody else removes."""

    def __init__(self, folder: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".weights", delete=False) as file:
            self._path = Path(file.name)
        self._end = 0

    def put(self, name: str, array: Any) -> ir.TensorProtocol:
        """An initialiser's tensor: on disk, or in memory where it is small.

        Raises:
            OSError: the disk is full.
        """
        tensor = ir.tensor(array, name=name)
        if array.nbytes <= _SMALL:
            return tensor
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(array).view(np.uint8).data)  # `tofile` drops the end on a full disk
        begin, self._end = self._end, self._end + array.nbytes
        return ir.ExternalTensor(
            self._path.name, begin, array.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=name,
            base_dir=self._path.parent,
        )  # fmt: skip
