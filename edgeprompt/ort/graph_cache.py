"""Graphs as ONNX Runtime optimised and packed them for this processor, so that later starts map them from disk.

ONNX Runtime lays out quantised weights for the processor's kernels when it opens a graph: copies in memory, and most
of the time that loading takes. Kept on disk, they are mapped instead: quicker, and pages that the system can drop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeprompt.ort import processor
from edgeprompt.package.files import atomic_folder
from edgeprompt.package.manifest import GraphFile
from edgeprompt.package.outputs import PACKED_GRAPH

_LOG = logging.getLogger("edgeprompt")
_GRAPH, _DATA, _SIZES = "graph.onnx", "graph.onnx.data", "sizes.json"
_MAPPED = "packed"
"""An empty file beside packed weights."""
_CONFIG = {
    "session.optimized_model_external_initializers_file_name": _DATA,
    "session.optimized_model_external_initializers_min_size_in_bytes": "16384",
}
"""ONNX Runtime's settings for writing an optimised graph. It opens the file of data once for every tensor that is not
in the graph's file, so the small ones stay in that."""
_PACKED = "session.save_external_prepacked_constant_initializers"
_OFFSET = re.compile(rb"\x0a\x06offset\x12.(\d+)", re.DOTALL)
"""Where a tensor begins in the file of data, as a graph's file tells it."""
_ALIGNMENT = 64
"""Bytes at whose multiples ONNX Runtime's kernels expect packed weights. ONNX Runtime 1.31 writes tensors below 1 MiB
one behind the other, and `MatMulNBits` answers wrongly, or NaN, where that leaves its weights between two multiples."""

SLOWER_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
"""Fusions that are switched off on the CPU, whose kernels for them are slower than for what they replace: at 2,048 rows
of 384, `SkipLayerNormalization` took 7.5 times as long as an addition and a layer norm, `BiasGelu` 1.6 times (ONNX
Runtime 1.31, AVX-512)."""


class _MisalignedError(Exception):
    """Packed weights that would be read wrongly."""


class GraphCache:
    """The place of one graph in a cache folder.

    An entry is bound to the graph's and its weights' hashes, the version of ONNX Runtime, the fusions that are switched
    off, how it is written and the processor: any other finds none. It is written whole or not at all.
    """

    def __init__(self, folder: Path, graph: GraphFile) -> None:
        settings = [*SLOWER_FUSIONS, *_CONFIG.values(), f"aligned to {_ALIGNMENT}", processor.describe()]
        key = [graph.sha256, *sorted(graph.data.values()), *settings]
        self._folder = folder
        self._name = f"graph-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]}"

    def _entry(self, ort_version: str) -> Path:
        return self._folder / f"{self._name}-{ort_version}"

    def newest_weights(self) -> Path | None:
        """The packed weights that were written last, by whatever version of ONNX Runtime."""
        found = self._folder.glob(f"{self._name}-*/{_DATA}")
        try:
            return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
        except OSError:  # another process is replacing them
            return None

    def find(self, ort_version: str) -> Path | None:
        """The packed graph, if it is there and whole."""
        entry = self._entry(ort_version)
        try:
            sizes = json.loads((entry / _SIZES).read_text(encoding="utf-8"))
            found = {name: (entry / name).stat().st_size for name in (_GRAPH, _DATA)}
        except (OSError, ValueError):
            return None
        return entry / _GRAPH if found == sizes else None

    def is_packed(self) -> bool:
        """Whether the entry that was written last holds packed weights, which sessions map."""
        weights = self.newest_weights()
        return weights is not None and (weights.parent / _MAPPED).exists()

    def drop(self, ort_version: str, reason: str) -> None:
        """Remove an entry that does not load; where none could be written, say so."""
        entry = self._entry(ort_version)
        if entry.exists():
            _LOG.warning("packed graph %s is not used and is made again: %s", entry, reason)
        else:
            _LOG.warning("the packed graph cannot be kept in %s: %s", self._folder, reason)
        shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def writing(self, ort_version: str, options: Any, *, packed: bool) -> Iterator[None]:
        """While inside, the session that `options` open writes the entry; it appears at the end.

        None appears where packed weights are not aligned. Write it with `packed` False then: every start packs them.

        Raises:
            OSError: the folder cannot be written.
        """
        with suppress(_MisalignedError), atomic_folder(self._entry(ort_version), PACKED_GRAPH, force=True) as folder:
            options.optimized_model_filepath = str(folder / _GRAPH)
            for name, value in {**_CONFIG, _PACKED: str(int(packed))}.items():
                options.add_session_config_entry(name, value)
            yield
            if packed and any(int(offset) % _ALIGNMENT for offset in _OFFSET.findall((folder / _GRAPH).read_bytes())):
                raise _MisalignedError
            if packed:
                (folder / _MAPPED).touch()
            (folder / _DATA).touch()  # none is written where all tensors are small
            sizes = {name: (folder / name).stat().st_size for name in (_GRAPH, _DATA)}
            (folder / _SIZES).write_text(json.dumps(sizes), encoding="utf-8")
