"""Rows of different tasks and lengths as one batch of the encoder's graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import Array

Ids = npt.NDArray[np.int64]

MAX_TOKENS = 1024
"""Most padded tokens of one batch: larger ones win no throughput and fall out of the processor's caches."""
MAX_WASTE = 0.1
"""A batch ends before a row that would leave more than this share of it to padding."""


@dataclass(frozen=True)
class Row:
    """One row, alone: ids at or above `vocab_size` are the prompt's virtual tokens, counted from its first."""

    ids: Ids
    type_ids: Ids
    embeddings: Array | None = None
    """`[num_virtual_tokens, embedding_size]`."""
    prefix: Array | None = None
    """`[num_layers, 2, num_heads, prefix_length, head_size]`."""
    mask_position: int = 0
    text: npt.NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    """Positions that hold no virtual token."""

    @property
    def length(self) -> int:
        """Tokens, virtual ones included."""
        return len(self.ids)

    @property
    def prefix_length(self) -> int:
        """Positions of the deep prompt."""
        return 0 if self.prefix is None else int(self.prefix.shape[3])


def make_row(
    ids: Sequence[int],
    vocab_size: int,
    *,
    type_ids: Sequence[int] | None = None,
    embeddings: Array | None = None,
    prefix: Array | None = None,
    mask_position: int = 0,
) -> Row:
    """A row from plain lists."""
    array = np.asarray(ids, np.int64)
    types = np.zeros_like(array) if type_ids is None else np.asarray(type_ids, np.int64)
    return Row(array, types, embeddings, prefix, mask_position, np.flatnonzero(array < vocab_size))


def split_batches(
    lengths: Sequence[int], prefix_lengths: Sequence[int], max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """Group rows of similar length: their indices, the longest first (memory peaks at once, then shrinks)."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], -prefix_lengths[index]))
    batches: list[list[int]] = []
    used = longest = widest = 0
    for index in order:
        length, prefix = lengths[index], max(widest, prefix_lengths[index])
        count = len(batches[-1]) + 1 if batches else 0
        fits = bool(batches) and count * (longest + prefix) <= max_tokens
        if fits and used + length >= (1 - MAX_WASTE) * count * longest:
            batches[-1].append(index)
            used, widest = used + length, prefix
        else:
            batches.append([index])
            used, longest, widest = length, length, prefix_lengths[index]
    return batches


def make_feeds(rows: Sequence[Row], manifest: Manifest, inputs: Collection[str]) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs for one batch.

    Rows are padded on the right. Prefixes of different length are padded on the right too, and masked; positions of a
    row's text start behind its own prefix.

    Args:
        rows: The batch, at least one row.
        manifest: The package's.
        inputs: Names of the inputs that the graph has.
    """
    size = manifest.geometry
    batch, length = len(rows), max(row.length for row in rows)
    prefix = max(row.prefix_length for row in rows)
    ids = np.full((batch, length), manifest.tokens.pad or 0, np.int64)
    types = np.zeros((batch, length), np.int64)
    mask = np.zeros((batch, prefix + length), np.int64)
    kv_type = np.float16 if manifest.kv_dtype == "float16" else np.float32
    past = np.zeros((size.num_layers, 2, batch, size.num_key_value_heads, prefix, size.head_size), kv_type)
    bank: dict[int, int] = {}
    tables: list[Array] = []
    used = 0
    for index, row in enumerate(rows):
        shift = 0
        if row.embeddings is not None:
            key = id(row.embeddings)
            if key not in bank:
                bank[key] = used
                used += len(row.embeddings)
                tables.append(row.embeddings)
            shift = bank[key]
        ids[index, : row.length] = np.where(row.ids >= size.vocab_size, row.ids + shift, row.ids)
        types[index, : row.length] = row.type_ids
        mask[index, prefix : prefix + row.length] = 1
        if row.prefix is not None:
            mask[index, : row.prefix_length] = 1
            past[:, :, index, :, : row.prefix_length] = row.prefix
    starts = np.array([row.prefix_length for row in rows])
    positions = starts[:, None] + np.arange(length)
    if size.max_positions:
        positions = np.minimum(positions, size.max_positions - 1)  # padding alone can reach beyond
    width = size.embedding_size or size.hidden_size
    feeds: dict[str, npt.NDArray[Any]] = {
        names.INPUT_IDS: ids,
        names.ATTENTION_MASK: mask,
        names.POSITION_IDS: positions + size.position_offset,
        names.TOKEN_TYPE_IDS: types,
        names.MASK_POSITIONS: np.array([row.mask_position for row in rows], np.int64),
        names.PROMPT_EMBEDDINGS: np.concatenate(tables, dtype=np.float32)
        if tables
        else np.zeros((1, width), np.float32),
    }
    for layer in range(size.num_layers):
        for part, name in enumerate(("key", "value")):
            feeds[names.past(layer, name)] = past[layer, part]
    return {name: value for name, value in feeds.items() if name in inputs}
