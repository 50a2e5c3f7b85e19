"""The two graphs of an encoder-decoder package, run on batches of rows of different length and prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package

Array = npt.NDArray[Any]
PARTS = ("key", "value")


@dataclass(frozen=True)
class SourceRow:
    """One text for the encoder.

    `ids` int64; ids at or above the vocabulary's size index `table` float32 `[rows, hidden_size]`. `prefix` holds
    encoder deep prompts `[num_encoder_layers, 2, num_heads, prefix_length, head_size]`.
    """

    ids: Array
    table: Array | None = None
    prefix: Array | None = None
    name: bytes = b""
    """Of all that its encoding depends on; empty where nobody asks for it again."""


@dataclass(frozen=True)
class Source:
    """What the encoder made of a batch; rows are padded on the right."""

    states: Array
    """float32 `[batch_size, sequence_length, hidden_size]`"""
    mask: Array
    """int64 `[batch_size, prefix_length + sequence_length]`"""
    cross: tuple[Array, ...]
    """Per decoder layer keys and values `[batch_size, num_heads, sequence_length, head_size]`."""

    def take(self, rows: Sequence[int]) -> Source:
        """Some of its rows."""
        index = list(rows)
        return Source(self.states[index], self.mask[index], tuple(tensor[index] for tensor in self.cross))

    def row(self, index: int) -> Array:
        """One row's keys and values `[2 * num_layers, num_heads, length, head_size]`, without padding."""
        length = int(self.text_mask[index].sum())
        return np.stack([tensor[index, :, :length] for tensor in self.cross])

    @staticmethod
    def of_row(row: Array) -> Source:
        """A batch of the one text whose `row` was kept; the encoder's states are gone."""
        length = row.shape[2]
        return Source(np.zeros((1, length, 0), np.float32), np.ones((1, length), np.int64), tuple(row[:, None]))

    @property
    def text_mask(self) -> Array:
        """The mask without deep prompts, `[batch_size, sequence_length]`."""
        return self.mask[:, self.mask.shape[1] - self.states.shape[1] :]


@dataclass
class DecoderState:
    """Caches of rows that decode together; pasts are padded on the left."""

    cross: tuple[Array, ...]
    cross_mask: Array
    past: list[Array] = field(default_factory=list)
    mask: Array = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def take(self, rows: Sequence[int] | Array) -> DecoderState:
        """The state of `rows`, which may repeat (beams) or lack (finished rows) some."""
        index = np.asarray(rows, np.int64)
        mask = self.mask[index]
        # Left padding that no remaining row needs, and encoder positions that none of them has.
        start = int(mask.argmax(axis=1).min()) if mask.size else 0
        cross_mask = self.cross_mask[index]
        stop = int(cross_mask.sum(axis=1).max())
        return DecoderState(
            tuple(tensor[index, :, :stop] for tensor in self.cross),
            cross_mask[:, :stop],
            [tensor[index, :, start:] for tensor in self.past],
            mask[:, start:],
        )


def joined(states: Sequence[DecoderState]) -> DecoderState:
    """Rows of several states as one, in order; pasts and texts of different length are padded."""
    if len(states) == 1:
        return states[0]
    past = max(state.mask.shape[1] for state in states)
    text = max(state.cross_mask.shape[1] for state in states)

    def wide(tensor: Array, axis: int, front: int, back: int) -> Array:
        width = [(0, 0)] * tensor.ndim
        width[axis] = (front, back)
        return np.pad(tensor, width) if front or back else tensor

    pads = [past - state.mask.shape[1] for state in states]
    rests = [text - state.cross_mask.shape[1] for state in states]
    return DecoderState(
        tuple(
            np.concatenate([wide(tensor, 2, 0, rest) for tensor, rest in zip(tensors, rests, strict=True)])
            for tensors in zip(*(state.cross for state in states), strict=True)
        ),
        np.concatenate([wide(state.cross_mask, 1, 0, rest) for state, rest in zip(states, rests, strict=True)]),
        [
            np.concatenate([wide(tensor, 2, pad, 0) for tensor, pad in zip(tensors, pads, strict=True)])
            for tensors in zip(*(state.past for state in states), strict=True)
        ],
        np.concatenate([wide(state.mask, 1, pad, 0) for state, pad in zip(states, pads, strict=True)]),
    )


class Seq2SeqGraphs:
    """Encoder and decoder sessions. Any number of threads may use it, except where the number of its own adapts."""

    def __init__(self, package: Package, sessions: Sessions) -> None:
        self._geometry = package.manifest.geometry
        self.heads = self._geometry.num_attention_heads
        """Heads of attention."""
        self._dtype = np.dtype(package.manifest.kv_dtype)
        self._pad = package.manifest.tokens.pad or 0
        encoder, decoder = sessions["encoder"], sessions["decoder"]
        self._encoder, self._decoder = encoder.ort, decoder.ort
        self._encoder_threads, self._decoder_threads = encoder.adaptive, decoder.adaptive
        self.provider = encoder.provider
        inputs = {value.name for value in encoder.ort.get_inputs()}
        self._decoder_inputs = {value.name for value in decoder.ort.get_inputs()}
        self.masks_past = names.ATTENTION_MASK in self._decoder_inputs
        """Whether rows with prefixes of different length may decode together (Optimum's decoders have no mask)."""
        self.has_encoder_prefix = names.past(0, "key") in inputs
        layers = range(self._geometry.num_layers)
        self._past_names = [names.past(layer, part) for layer in layers for part in PARTS]
        self._cross_names = [names.cross_past(layer, part) for layer in layers for part in PARTS]
        self._encoder_outputs = [
            names.ENCODER_HIDDEN_STATES,
            *(names.cross_present(layer, part) for layer in layers for part in PARTS),
        ]
        self._decoder_outputs = [
            names.LOGITS,
            *(names.present(layer, part) for layer in layers for part in PARTS),
        ]

    def encode(self, rows: Sequence[SourceRow]) -> Source:
        """Run the encoder on a batch of rows."""
        length = max(row.ids.size for row in rows)
        ids = np.full((len(rows), length), self._pad, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        tables = _Tables(self._geometry.vocab_size, self._geometry.hidden_size)
        for place, row in enumerate(rows):
            ids[place, : row.ids.size] = tables.shifted(row)
            mask[place, : row.ids.size] = 1
        feeds: dict[str, Array] = {names.INPUT_IDS: ids, names.PROMPT_EMBEDDINGS: tables.rows()}
        if self.has_encoder_prefix:
            size = self._geometry
            past, front = _left_padded(
                [row.prefix for row in rows],
                (size.num_encoder_layers, 2, size.num_attention_heads, 0, size.head_size),
                self._dtype,
            )
            feeds |= {
                names.past(layer, part): past[2 * layer + index]
                for layer in range(size.num_encoder_layers)
                for index, part in enumerate(PARTS)
            }
            mask = np.concatenate([front, mask], axis=1)
        feeds[names.ATTENTION_MASK] = mask
        began = time.perf_counter(), time.process_time()
        states, *cross = self._encoder.run(self._encoder_outputs, feeds)
        if self._encoder_threads is not None:
            self._encoder = self._encoder_threads.ran(("encode", ids.size.bit_length()), ids.size, began)
        return Source(states, mask, tuple(cross))

    def begin(self, source: Source, prefixes: Sequence[Array | None]) -> DecoderState:
        """Decoder rows that have seen nothing but their prompts' prefixes.

        Args:
            source: The encoded batch.
            prefixes: For each row None or `[num_layers, 2, num_key_value_heads, prefix_length, head_size]`.
        """
        size = self._geometry
        empty = (size.num_layers, 2, size.num_key_value_heads, 0, size.head_size)
        past, mask = _left_padded(prefixes, empty, self._dtype)
        return DecoderState(source.cross, source.text_mask, past, mask)

    def step(self, state: DecoderState, tokens: Sequence[int] | Array) -> npt.NDArray[np.float32]:
        """Run one token per row; grows the state. Returns the next token's logits `[rows, vocab_size]`."""
        ids = np.asarray(tokens, np.int64)[:, None]
        mask = np.concatenate([state.mask, np.ones_like(ids)], axis=1)
        feeds = {
            names.INPUT_IDS: ids,
            names.ATTENTION_MASK: mask,
            names.ENCODER_ATTENTION_MASK: state.cross_mask,
            **dict(zip(self._past_names, state.past, strict=True)),
            **dict(zip(self._cross_names, state.cross, strict=True)),
        }
        known = {name: value for name, value in feeds.items() if name in self._decoder_inputs}
        began = time.perf_counter(), time.process_time()
        logits, *state.past = self._decoder.run(self._decoder_outputs, known)
        if self._decoder_threads is not None:
            self._decoder = self._decoder_threads.ran(("step", len(ids)), 1, began)
        state.mask = mask
        found: npt.NDArray[np.float32] = logits[:, -1].astype(np.float32, copy=False)
        return found


class _Tables:
    """The prompt rows of one batch, each prompt's once, and ids moved to where its rows lie."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        self._vocab = vocab_size
        self._empty = np.zeros((1, hidden_size), np.float32)
        self._starts: dict[int, int] = {}
        self._tables: list[Array] = []
        self._count = 0

    def shifted(self, row: SourceRow) -> Array:
        if row.table is None:
            return row.ids
        start = self._starts.get(id(row.table))
        if start is None:
            start = self._starts[id(row.table)] = self._count
            self._tables.append(row.table)
            self._count += row.table.shape[0]
        return np.where(row.ids >= self._vocab, row.ids + start, row.ids)

    def rows(self) -> Array:
        return np.concatenate(self._tables).astype(np.float32, copy=False) if self._tables else self._empty


def _left_padded(prefixes: Sequence[Array | None], empty: tuple[int, ...], dtype: Any) -> tuple[list[Array], Array]:
    """Prefixes of a batch as a list of `[batch_size, heads, longest, head_size]`, two a layer, and their mask."""
    rows = [np.zeros(empty, dtype) if prefix is None else prefix for prefix in prefixes]
    longest = max(row.shape[3] for row in rows)
    layers, parts, heads, _, head_size = empty
    past = np.zeros((layers * parts, len(rows), heads, longest, head_size), dtype)
    mask = np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        start = longest - row.shape[3]
        past[:, place, :, start:] = row.reshape(layers * parts, heads, row.shape[3], head_size)
        mask[place, start:] = 1
    return list(past), mask
