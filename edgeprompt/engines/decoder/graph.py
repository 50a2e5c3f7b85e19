"""A decoder-only graph and the rows that run on it: prefill one row, or one decode step for many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.decoding.strategies import WORDS_AT_ONCE
from edgeprompt.ort.kv_cache import KV, KVShape, Part, SlotCache
from edgeprompt.ort.session import Session, graph_inputs, import_onnxruntime

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

LOGITS_BUDGET = 64 << 20
"""Most bytes of logits per prefill chunk, for graphs that compute them at every position."""
PREFILL_CHUNK = 512
BLOCK = 8
"""Positions of the pieces in which a text's keys and values are kept: less than this is read again of a text that is
known."""
KEPT_LENGTH = 1024
"""Positions a slot that an idle cache keeps its memory for."""
MASK_STEP = 64
"""Masks of decode steps are a multiple of this wide: the shapes stay, so does what ONNX Runtime knows about them."""


class DecoderGraph(Protocol):
    """What the scheduler needs of a graph. Rows are numbered; the first `n` take part in a decode step."""

    chunk: int
    row_groups: tuple[int, ...]
    """How many rows of a prefill attention may take at once, the largest number last."""
    gives_states: bool
    """Whether the graph has `hidden_states`, what its logits are computed from."""
    gives_all_states: bool
    """Whether it gives them at every position, not at the last one alone."""
    gives_several_logits: bool
    """Whether `run_ahead` can be called: several positions of one row in one step, with the logits of each."""

    def fits(self, rows: int, length: int, first: int = 0) -> bool:
        """Whether that many rows of that many positions, behind `first` others, are within the budget."""

    def place(self, row: int, parts: Sequence[Part], length: int, used: int) -> None:
        """Start row `row` on keys and values that are there, with room for `length` positions."""

    def name(self, row: int, parts: Sequence[tuple[bytes, int]], start: int) -> None:
        """Say that a row's keys and values from `start` on are parts of these names and lengths."""

    def prefill(
        self, row: int, ids: Sequence[int], past: int, rows: Logits | None, states: list[Logits] | None = None
    ) -> Logits:
        """Run a row's next ids behind `past` positions; float32 [vocab_size] of the last one.

        `states` gets their hidden states, float32 [positions, hidden_size], where the graph gives them.
        """

    def write(self, row: int, past: int, part: KV) -> None:
        """Put keys and values [2 * num_layers, heads, positions, head_size] behind a row's `past` positions."""

    def decode(self, ids: Sequence[int], lengths: Sequence[int], first: int = 0) -> Logits:
        """One token for each row from `first` on, `lengths` positions before it; float32 [rows, vocab_size]."""

    def decode_one(self, row: int, token: int, length: int) -> Logits:
        """One token for one row; float32 [vocab_size]."""

    def run_ahead(self, row: int, ids: Sequence[int], length: int) -> Logits:
        """Several tokens of one row, `length` positions before them; float32 [tokens, vocab_size]."""

    def spread(self, row: int, count: int, past: int, length: int) -> None:
        """Let `count` rows from `row` on begin with the `past` positions of that row, with room for `length`."""

    def branch(self, row: int, parents: Sequence[int] | None, start: int, past: int) -> None:
        """Let each row from `row` on continue the one that its parent names, counted from `row`.

        Args:
            row: the first of the rows.
            parents: one for each that goes on; None: they begin again where they were spread.
            start: positions that were spread.
            past: positions that the parents have.
        """

    def release(self, row: int) -> None:
        """No row from `row` on is used any more."""

    def read(self, row: int, start: int, end: int) -> KV | None:
        """Copy of a row's keys and values from position `start` to `end`; None where the graph keeps fewer."""

    def move(self, source: int, target: int, length: int) -> None:
        """Let `target` continue where `source` is."""

    def idle(self) -> None:
        """No row is running: give back what a long request took."""


def open_graph(
    session: Session,
    shape: KVShape,
    *,
    in_place: bool,
    hidden_size: int,
    max_rows: int,
    budget: int,
    batch_invariant: bool = False,
) -> DecoderGraph:
    """The way to run a graph: caches shared in place where its attention appends in place, else grown by the graph.

    Args:
        session: the open graph.
        shape: of its cache.
        in_place: whether its attention appends in place (`Manifest.kv_in_place`).
        hidden_size: of its prompt rows.
        max_rows: most rows of a decode step.
        budget: most bytes of cache.
        batch_invariant: give rows the same bits alone and together. Kernels for one row add up in another order than
            those for several, and int8 activations make that visible: a lone row runs as two, or, where the graph
            grows its caches, every row alone.
    """
    if session.device != "cpu" or not in_place:
        grown = GrowingGraph(session, shape, hidden_size=hidden_size, max_rows=max_rows, budget=budget)
        if batch_invariant:
            grown.together = "none"
        elif in_place:
            grown.together = "padded behind"
        return grown
    graph = SharedGraph(session, shape, hidden_size=hidden_size, max_rows=max_rows, budget=budget)
    graph.least_rows = 2 if batch_invariant else 1
    return graph


class _Graph:
    """What both ways share: names, types and the small inputs."""

    def __init__(self, session: Session, shape: KVShape, *, hidden_size: int, max_rows: int, budget: int) -> None:
        self._ort, self._adaptive = session.ort, session.adaptive
        self._shape, self._max_rows, self._budget = shape, max_rows, budget
        inputs = {value.name: value for value in graph_inputs(self._ort)}
        outputs = {value.name: value for value in self._ort.get_outputs()}
        self._inputs, self._outputs = set(inputs), set(outputs)
        logits = outputs[names.LOGITS]
        self._vocab = int(logits.shape[2])
        self._logits_type = np.float16 if "float16" in logits.type else np.float32
        self._last_only = logits.shape[1] == 1
        states = outputs.get(names.HIDDEN_STATES)
        self.gives_states = states is not None
        self._states_type = np.float16 if states is not None and "float16" in states.type else np.float32
        self._states_last_only = states is not None and states.shape[1] == 1
        self.gives_all_states = self.gives_states and not self._states_last_only
        self.gives_several_logits = False
        self.chunk = PREFILL_CHUNK
        if not self._last_only:
            self.chunk = min(PREFILL_CHUNK, max(BLOCK, LOGITS_BUDGET // (4 * self._vocab) // BLOCK * BLOCK))
        # MLAS takes rows by both heads' widths together, and fewer where L2 is small (128 of 256 at 512 KiB).
        most = 2 * shape.head_size
        self.row_groups: tuple[int, ...] = (min(128, most), most)
        self._no_rows = np.zeros((1, hidden_size), np.float32)
        self._blocks = [
            (2 * layer + index, names.past(layer, part), names.present(layer, part))
            for layer in range(shape.num_layers)
            for index, part in enumerate(("key", "value"))
        ]


@dataclass
class _Step:
    """A decode step that is bound: `mask` [rows, width] int64, `ids` and `positions` [rows, tokens] int64."""

    binding: Any
    ids: Ids
    positions: Ids
    mask: Ids
    logits: Logits | npt.NDArray[np.float16]
    """[rows, tokens, vocab_size]."""


class SharedGraph(_Graph):
    """GroupQueryAttention: past and present are the same memory, and the operator appends in place.

    A binding holds addresses. A prefill has one per slot; a decode step has one per number of rows, whose ids, mask
    and logits are bound once and filled in place.
    """

    def __init__(self, session: Session, shape: KVShape, *, hidden_size: int, max_rows: int, budget: int) -> None:
        super().__init__(session, shape, hidden_size=hidden_size, max_rows=max_rows, budget=budget)
        self.least_rows = 1
        """Decode steps of fewer rows are filled up with rows whose answers are dropped."""
        self._cache = SlotCache(shape, max_slots=max_rows + WORDS_AT_ONCE, budget=budget)
        self._prefills: dict[tuple[int, bool], Any] = {}
        """By slot, and whether hidden states are asked for."""
        self._steps: dict[tuple[int, int, int], _Step] = {}
        """By first slot, number of rows, and tokens of each."""
        self._generation = -1
        kept = names.LOGITS_TO_KEEP in self._inputs and names.KEPT_LOGITS in self._outputs
        self.gives_several_logits = kept or not self._last_only
        self._logits = np.empty((max(max_rows + 1, WORDS_AT_ONCE), 1, self._vocab), self._logits_type)
        self._count = np.empty(0, np.int64)
        self._to_keep: dict[int, Ids] = {}
        """What is bound as `logits_to_keep`, by its value."""

    def fits(self, rows: int, length: int, first: int = 0) -> bool:
        """Whether that many rows of that many positions, behind `first` others, are within the budget."""
        return self._cache.fits(first + max(rows, self.least_rows), length)

    def place(self, row: int, parts: Sequence[Part], length: int, used: int) -> None:
        """Start a row; what its slot still holds from its last row is used as it is."""
        self._reserve(max(row + 1, self.least_rows), length, used)
        self._cache.place(row, parts)

    def name(self, row: int, parts: Sequence[tuple[bytes, int]], start: int) -> None:
        """Say what a slot holds."""
        self._cache.name(row, parts, start)

    def _reserve(self, rows: int, length: int, used: int) -> None:
        self._cache.reserve(rows, length, used)
        if self._generation != self._cache.generation:
            self._generation = self._cache.generation
            self._prefills.clear()
            self._steps.clear()
            self._count = np.arange(self._cache.length)

    def prefill(
        self, row: int, ids: Sequence[int], past: int, rows: Logits | None, states: list[Logits] | None = None
    ) -> Logits:
        """Run a row's next ids on top of `past` positions of its slot."""
        key = row, states is not None
        binding = self._prefills.get(key)
        if binding is None:
            binding = self._prefills[key] = self._bound(row, 1)
        count = len(ids)
        table = self._no_rows if rows is None else rows
        tensors = [
            np.asarray([ids], np.int64),
            np.ones((1, past + count), np.int64),
            np.arange(past, past + count)[None],
        ]
        self._bind(binding, names.INPUT_IDS, tensors[0])
        self._bind(binding, names.ATTENTION_MASK, tensors[1])
        self._bind(binding, names.POSITION_IDS, tensors[2])
        self._bind(binding, names.PROMPT_EMBEDDINGS, table)
        logits = self._logits[:1] if self._last_only else np.empty((1, count, self._vocab), self._logits_type)
        self._bind_output(binding, names.LOGITS, logits)
        found = None
        if states is not None and self.gives_states:
            found = np.empty((1, 1 if self._states_last_only else count, self._no_rows.shape[1]), self._states_type)
            self._bind_output(binding, names.HIDDEN_STATES, found)
        self._cache.extend(row, past, past + count)
        self._run(binding, ("prefill", count.bit_length()), count)
        if states is not None and found is not None:
            states.append(found[0].astype(np.float32, copy=False))
        last: Logits = logits[0, -1].astype(np.float32, copy=False)
        return last

    def write(self, row: int, past: int, part: KV) -> None:
        """Put keys and values behind `past` positions of a slot."""
        self._cache.write(row, past, part)

    def decode(self, ids: Sequence[int], lengths: Sequence[int], first: int = 0) -> Logits:
        """One token for each row from `first` on."""
        count, fill = len(ids), range(len(ids), self.least_rows)
        if fill:
            ids = [*ids, *(0 for _ in fill)]
            lengths = [*lengths, *(self._cache.spare(first + slot) for slot in fill)]
        return self._step(first, ids, lengths)[:count]

    def decode_one(self, row: int, token: int, length: int) -> Logits:
        """One token for one row."""
        logits: Logits = self._step(row, (token,), (length,))[0]
        return logits

    def run_ahead(self, row: int, ids: Sequence[int], length: int) -> Logits:
        """Several tokens of one row. What is written behind those that turn out to be wrong is overwritten later."""
        step = self._bound_step(row, 1, len(ids), length + len(ids))
        step.ids[0] = ids
        step.positions[0] = np.arange(length, length + len(ids))
        np.less(self._count[: step.mask.shape[1]], length + len(ids), out=step.mask[0], casting="unsafe")
        self._run(step.binding, ("ahead", len(ids)), 1)
        logits: Logits = step.logits[0].astype(np.float32, copy=False)
        return logits

    def _step(self, row: int, ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        count = len(ids)
        step = self._bound_step(row, count, 1, max(lengths) + 1)
        step.ids[:, 0] = ids
        step.positions[:, 0] = lengths
        np.less_equal(self._count[: step.mask.shape[1]], step.positions, out=step.mask, casting="unsafe")
        self._run(step.binding, ("step", count), 1)
        return self._logits[:count, 0].astype(np.float32, copy=False)

    def _run(self, binding: Any, kind: tuple[str, int], units: int) -> None:
        """Run, and go on with the session whose threads pay now: the cache belongs to none."""
        began = time.perf_counter(), time.process_time()
        self._ort.run_with_iobinding(binding)
        if self._adaptive is not None and (ort := self._adaptive.ran(kind, units, began)) is not self._ort:
            self._ort = ort
            self._prefills.clear()
            self._steps.clear()

    def _bound_step(self, row: int, count: int, tokens: int, total: int) -> _Step:
        """The step of these rows and tokens, with a mask for `total` positions."""
        width = min(-(-total // MASK_STEP) * MASK_STEP, self._cache.length)
        step = self._steps.get((row, count, tokens))
        if step is None:
            step = self._steps[row, count, tokens] = self._new_step(row, count, tokens)
        if step.mask.shape[1] != width:
            step.mask = np.empty((count, width), np.int64)
            self._bind(step.binding, names.ATTENTION_MASK, step.mask)
        return step

    def _new_step(self, row: int, count: int, tokens: int) -> _Step:
        ids, positions = np.empty((count, tokens), np.int64), np.empty((count, tokens), np.int64)
        binding, logits = self._bound(row, count), self._logits[:count]
        self._bind(binding, names.INPUT_IDS, ids)
        self._bind(binding, names.POSITION_IDS, positions)
        self._bind(binding, names.PROMPT_EMBEDDINGS, self._no_rows)
        if tokens > 1:
            logits = np.empty((count, tokens, self._vocab), self._logits_type)
        if tokens > 1 and self._last_only:
            self._bind(binding, names.LOGITS_TO_KEEP, self._to_keep.setdefault(tokens, np.array([tokens], np.int64)))
            self._bind_output(binding, names.KEPT_LOGITS, logits)
        else:
            self._bind_output(binding, names.LOGITS, logits)
        return _Step(binding, ids, positions, np.empty((count, 0), np.int64), logits)

    def spread(self, row: int, count: int, past: int, length: int) -> None:
        """Copy a slot into those behind it."""
        self._reserve(row + max(count, self.least_rows), length, row + 1)
        # The last of the positions is never run, so a step that is filled up has it to write at.
        self._cache.spread(row, count, past, length - 1)

    def branch(self, row: int, parents: Sequence[int] | None, start: int, past: int) -> None:
        """Copy what slots have behind the part that all share."""
        if parents is not None:
            self._cache.branch(row, parents, start, past)

    def release(self, row: int) -> None:
        """Nothing to do: slots are memory."""

    def read(self, row: int, start: int, end: int) -> KV:
        """Copy of a slot's keys and values."""
        return self._cache.read(row, start, end)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot over another (when a row in the middle leaves)."""
        self._cache.move(source, target, length)

    def idle(self) -> None:
        """Give back what a long request took."""
        self._cache.shrink(KEPT_LENGTH, self._max_rows + 1)

    def _bound(self, row: int, count: int) -> Any:
        """A binding whose past and present are `count` slots from `row` on."""
        binding, size = self._ort.io_binding(), self._shape
        shape = (count, size.num_heads, self._cache.length, size.head_size)
        for block, past, present in self._blocks:
            place = ("cpu", 0, np.dtype(size.dtype).type, shape, self._cache.pointer(block, row))
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
        return binding

    def _bind(self, binding: Any, name: str, array: npt.NDArray[Any]) -> None:
        if name in self._inputs:
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, binding: Any, name: str, array: npt.NDArray[Any]) -> None:
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


@dataclass(frozen=True)
class _Grown:
    """Where the keys and values of a row are: in a batch that ran together."""

    values: list[Any]
    """For each layer's keys and values, [rows, heads, positions, head_size] on the session's device."""
    place: int = 0
    """Which of the rows."""
    start: int = 0
    """Where its positions begin."""

    def ends_at(self, position: int) -> bool:
        """Whether `values` hold that many positions and no more; a graph whose attention has a window keeps fewer."""
        return all(value.shape()[2] == position for value in self.values)


class GrowingGraph(_Graph):
    """Attention that returns past and new keys joined (others' graphs): each row has its own, or those of a batch.

    Keys and values stay on the session's device between steps. This is also how every graph runs on other devices than
    the CPU, whose memory cannot be filled from here in parts. Rows of a decode step run together, and stay together in
    memory until one joins or leaves.
    """

    def __init__(self, session: Session, shape: KVShape, *, hidden_size: int, max_rows: int, budget: int) -> None:
        super().__init__(session, shape, hidden_size=hidden_size, max_rows=max_rows, budget=budget)
        masked = {names.ATTENTION_MASK, names.POSITION_IDS} <= self._inputs
        self.together: Literal["padded behind", "padded in front", "of one length", "none"] = (
            "padded in front" if masked else "of one length"
        )
        """Which rows run together, and how: GroupQueryAttention counts each row's positions from 0. Others' graphs take
        the new position behind all that is there, and where the caller cannot number it, the row must have as many."""
        self._value = import_onnxruntime().OrtValue
        self._device = session.device
        self._rows: dict[int, _Grown] = {}
        self._stems: dict[int, _Grown] = {}
        """What rows began with that were spread, by the first of them."""

    def fits(self, rows: int, length: int, first: int = 0) -> bool:
        """Whether that many rows of that many positions, behind `first` others, are within the budget."""
        return (first + rows) * length * self._shape.bytes_per_position <= self._budget

    def place(self, row: int, parts: Sequence[Part], length: int, used: int) -> None:
        """Start a row on keys and values that are there."""
        size = self._shape
        empty = np.empty((2 * size.num_layers, size.num_heads, 0, size.head_size), size.dtype)
        begun = np.concatenate([empty, *(part for _, part in parts)], axis=2)
        self._rows[row] = _Grown([self._send(block[None]) for block in begun])

    def name(self, row: int, parts: Sequence[tuple[bytes, int]], start: int) -> None:
        """Nothing to do: a row begins anew each time."""

    def prefill(
        self, row: int, ids: Sequence[int], past: int, rows: Logits | None, states: list[Logits] | None = None
    ) -> Logits:
        """Run a row's next ids."""
        total = past + len(ids)
        heads = [names.LOGITS, *([names.HIDDEN_STATES] if states is not None and self.gives_states else [])]
        last, *more = self._run(
            [row],
            np.asarray([ids], np.int64),
            np.ones((1, total), np.int64),
            np.arange(past, total)[None],
            self._no_rows if rows is None else rows,
            self._alone(self._rows[row], past),
            heads,
        )
        if states is not None:
            states += (found[0] for found in more)
        logits: Logits = last[0, -1]
        return logits

    def write(self, row: int, past: int, part: KV) -> None:
        """Join keys and values to a row's."""
        begun = self._alone(self._rows[row], past)
        self._rows[row] = _Grown(
            [
                self._send(np.concatenate([value.numpy(), block[None]], axis=2))
                for value, block in zip(begun, part, strict=True)
            ]
        )

    def decode(self, ids: Sequence[int], lengths: Sequence[int], first: int = 0) -> Logits:
        """One token for each row from `first` on, in one step where the graph can tell rows' positions apart."""
        groups: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            kept, group = self._rows[first + place], -1 - place
            if self.together != "none" and (self.together == "padded behind" or kept.ends_at(kept.start + length)):
                group = length if self.together == "of one length" else 0
            groups.setdefault(group, []).append(place)
        logits = np.empty((len(ids), self._vocab), np.float32)
        for places in groups.values():
            logits[places] = self._together(
                [first + place for place in places],
                [ids[place] for place in places],
                [lengths[place] for place in places],
            )
        return logits

    def decode_one(self, row: int, token: int, length: int) -> Logits:
        """One token for one row."""
        return self.prefill(row, (token,), length, None)

    def run_ahead(self, row: int, ids: Sequence[int], length: int) -> Logits:
        """Not here: what was appended for nothing would have to be cut off a cache that is not in this memory."""
        raise NotImplementedError("rows of a growing graph run one token at a time")

    def spread(self, row: int, count: int, past: int, length: int) -> None:
        """Share a row's keys and values: steps make new ones and leave these as they are."""
        self._stems[row] = self._rows[row]
        self._rows.update(dict.fromkeys(range(row, row + count), self._rows[row]))

    def branch(self, row: int, parents: Sequence[int] | None, start: int, past: int) -> None:
        """Share the parents' keys and values."""
        if parents is None:
            self._rows.update(dict.fromkeys((other for other in self._rows if other >= row), self._stems[row]))
        else:
            self._rows.update(enumerate([self._rows[row + parent] for parent in parents], row))

    def release(self, row: int) -> None:
        """Free rows."""
        for kept in (self._rows, self._stems):
            for gone in [other for other in kept if other >= row]:
                del kept[gone]

    def read(self, row: int, start: int, end: int) -> KV | None:
        """A row's keys and values; None where attention has a window and the graph keeps no more."""
        kept = self._rows[row]
        start, end = kept.start + start, kept.start + end
        if any(value.shape()[2] < end for value in kept.values):
            return None
        found: KV = np.stack([value.numpy()[kept.place, :, start:end] for value in kept.values])
        return found

    def move(self, source: int, target: int, length: int) -> None:
        """Hand a row's keys and values over."""
        self._rows[target] = self._rows.pop(source)

    def idle(self) -> None:
        """Free all rows."""
        self.release(0)

    def _alone(self, kept: _Grown, past: int) -> list[Any]:
        """The keys and values of a row by itself, [1, heads, `past` or fewer, head_size]."""
        if kept.start == 0 and all(value.shape()[0] == 1 and value.shape()[2] <= past for value in kept.values):
            return kept.values
        row, end = slice(kept.place, kept.place + 1), kept.start + past
        return [self._send(value.numpy()[row, :, kept.start : end]) for value in kept.values]

    def _together(self, rows: Sequence[int], ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        """A step of one token for some rows."""
        if len(rows) == 1:
            return self.decode_one(rows[0], ids[0], lengths[0])[None]
        width = max(lengths)
        starts = [0 if self.together == "padded behind" else width - length for length in lengths]
        columns, positions = np.arange(width + 1), np.asarray(lengths, np.int64)[:, None]
        begins = np.asarray(starts, np.int64)[:, None]
        mask = ((columns >= begins) & (columns <= begins + positions)).astype(np.int64)
        tokens = np.asarray(ids, np.int64)[:, None]
        values = self._joined(rows, starts, lengths)
        (logits,) = self._run(rows, tokens, mask, positions, self._no_rows, values, [names.LOGITS], starts)
        found: Logits = logits[:, -1]
        return found

    def _joined(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> list[Any]:
        """The keys and values of some rows as a batch: as they are where they ran together last."""
        kept, width = [self._rows[row] for row in rows], max(lengths)
        values = kept[0].values
        if (
            values[0].shape()[0] == len(rows)
            and all(one.values is values for one in kept)
            and [(one.place, one.start) for one in kept] == [*enumerate(starts)]
            and kept[0].ends_at(width)
        ):
            return values
        size, made = self._shape, []
        for block in range(2 * size.num_layers):
            batch = np.zeros((len(rows), size.num_heads, width, size.head_size), size.dtype)
            seen = {id(one.values): one.values[block] for one in kept}
            arrays = {key: value.numpy() for key, value in seen.items()}  # copied once from another device
            for place, (one, start, length) in enumerate(zip(kept, starts, lengths, strict=True)):
                row = arrays[id(one.values)][one.place]
                batch[place, :, start : start + length] = row[:, one.start : one.start + length]
            made.append(self._send(batch))
        return made

    def _run(
        self,
        rows: Sequence[int],
        ids: Ids,
        mask: Ids,
        positions: Ids,
        table: Logits,
        values: list[Any],
        heads: Sequence[str],
        starts: Sequence[int] = (0,),
    ) -> list[Logits]:
        """Run rows as a batch, and keep what it returns as theirs; the outputs that `heads` names, as float32."""
        small = {
            names.INPUT_IDS: ids,
            names.ATTENTION_MASK: mask,
            names.POSITION_IDS: positions,
            names.PROMPT_EMBEDDINGS: table,
        }
        binding = self._ort.io_binding()
        for name, array in small.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        for name in heads:
            binding.bind_output(name, "cpu")
        for block, name, present in self._blocks:
            binding.bind_ortvalue_input(name, values[block])
            binding.bind_output(present, self._device)
        began = time.perf_counter(), time.process_time()
        self._ort.run_with_iobinding(binding)
        if self._adaptive is not None:
            kind = ("prefill", ids.size.bit_length()) if len(rows) == 1 else ("step", len(rows))
            self._ort = self._adaptive.ran(kind, ids.size, began)
        found = binding.get_outputs()
        grown = found[len(heads) :]
        self._rows.update((row, _Grown(grown, place, starts[place])) for place, row in enumerate(rows))
        return [value.numpy().astype(np.float32, copy=False) for value in found[: len(heads)]]

    def _send(self, array: npt.NDArray[Any]) -> Any:
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
