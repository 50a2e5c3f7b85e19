"""Keys and values: one growing buffer with a slot per running row, and what is resident of prompts and texts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import PackageError

KV = npt.NDArray[np.float32] | npt.NDArray[np.float16]

LEAST_LENGTH = 256
"""Positions of the shortest buffer."""


@dataclass(frozen=True)
class KVShape:
    """What one position of one row takes."""

    num_layers: int
    num_heads: int
    head_size: int
    dtype: str

    @property
    def bytes_per_position(self) -> int:
        """Bytes of the keys and values of one position."""
        return 2 * self.num_layers * self.num_heads * self.head_size * np.dtype(self.dtype).itemsize

    def check(self, inputs: Iterable[Any]) -> None:
        """Compare with the caches that a graph takes (ONNX Runtime's description of its inputs).

        Raises:
            PackageError: the graph has other layers, heads or head sizes than the manifest says.
        """
        caches = [value.shape for value in inputs if value.name.startswith(f"{names.PAST_KEY_VALUES}.")]
        found = {"num_layers": len(caches) / 2, "num_key_value_heads": self.num_heads, "head_size": self.head_size}
        for _, heads, _, size in caches:  # a dimension without a fixed size is a name
            found["num_key_value_heads"] = heads if isinstance(heads, int) else self.num_heads
            found["head_size"] = size if isinstance(size, int) else self.head_size
        for name, expected in zip(found, (self.num_layers, self.num_heads, self.head_size), strict=True):
            if found[name] != expected:
                raise PackageError(
                    f"the manifest says {name} {expected}, and the graph has {found[name]:g}; export the base again"
                )

    def prefix(self, past_key_values: npt.NDArray[Any]) -> KV:
        """A prompt file's `past_key_values` [num_layers, 2, heads, length, head_size] as the cache keeps it."""
        layers, two, heads, length, size = past_key_values.shape
        prefix: KV = np.ascontiguousarray(past_key_values, self.dtype).reshape(layers * two, heads, length, size)
        return prefix


Part: TypeAlias = tuple[bytes, KV]
"""Keys and values [2 * num_layers, heads, positions, head_size], and a name that no others have."""


@dataclass(frozen=True)
class _Slot:
    """What a slot holds: the one record that placing, moving and filling up a step go by."""

    parts: tuple[tuple[bytes, int], ...] = ()
    """Parts at the slot's start, by name and length: sequences write behind them only, so the next sequence may use
    them as they are."""
    written: int = 0
    """Positions that a prefill still needs; a sequence that fills up a step writes at this one or behind it."""

    @property
    def size(self) -> int:
        """Positions of the parts."""
        return sum(length for _, length in self.parts)

    def within(self, end: int, written: int) -> _Slot:
        """The same with the parts that lie before position `end`."""
        parts, size = [], 0
        for part in self.parts:
            size += part[1]
            if size > end:
                break
            parts.append(part)
        return _Slot(tuple(parts), written)


_EMPTY = _Slot()


class SlotCache:
    """One buffer [2 * num_layers, slots, heads, length, head_size] for all running sequences.

    Sequence `i` lives in slot `i`, so a decode step of `n` sequences reads the first `n` slots and a prefill one slot,
    both as plain sub-blocks of each layer's block: nothing is copied per step. The buffer grows by doubling (the
    sequences in it are copied then) up to `budget` bytes. Memory that no sequence has touched is not resident.
    """

    def __init__(self, shape: KVShape, *, max_slots: int, budget: int) -> None:
        self.shape = shape
        self.max_slots = max_slots
        self.budget = budget
        self.slots = 0
        self.length = 0
        self.generation = 0
        """Rises whenever the buffer moves, so that bindings know that they are stale."""
        self._held: dict[int, _Slot] = {}
        self._buffer: KV = np.empty((2 * shape.num_layers, 0, shape.num_heads, 0, shape.head_size), shape.dtype)

    def fits(self, slots: int, length: int) -> bool:
        """Whether the budget allows `slots` rows of `length` positions."""
        return slots <= self.max_slots and slots * _round(length) * self.shape.bytes_per_position <= self.budget

    def reserve(self, slots: int, length: int, used: int) -> None:
        """Make room for `slots` rows of `length` positions, keeping what the first `used` slots hold."""
        length = _round(length)
        if slots <= self.slots and length <= self.length:
            return
        if self.fits(slots, max(length, self.length)):
            length = max(length, self.length)
        wanted = min(max(self.slots, 1 << (slots - 1).bit_length()), self.max_slots)
        slots = wanted if self.fits(wanted, length) else slots
        size = self.shape
        buffer: KV = np.empty((2 * size.num_layers, slots, size.num_heads, length, size.head_size), size.dtype)
        kept = min(length, self.length)
        if used:
            buffer[:, :used, :, :kept] = self._buffer[:, :used, :, :kept]
        self._buffer = buffer
        self.slots, self.length = slots, length
        self._held = {
            slot: held for slot, held in self._held.items() if slot < used and max(held.written, held.size) <= kept
        }
        self.generation += 1

    def shrink(self, length: int, slots: int) -> None:
        """Give back all memory if it is more than that many slots of `length` positions; only while none is in use."""
        if self.length > _round(length) or self.slots > slots:
            self.slots = self.length = 0
            self._buffer = self._buffer[:, :0, :, :0]
            self._held.clear()
            self.generation += 1

    def pointer(self, block: int, slot: int) -> int:
        """Address of `slot` in block `2 * layer + (0 keys, 1 values)`."""
        strides = self._buffer.strides
        return int(self._buffer.ctypes.data) + block * strides[0] + slot * strides[1]

    def place(self, slot: int, parts: Sequence[Part]) -> None:
        """Begin a slot with some parts; those that are still there stay."""
        held = self._held.pop(slot, _EMPTY)  # should a copy fail, the slot holds nothing
        end, there = 0, True
        for place, (name, part) in enumerate(parts):
            length = part.shape[2]
            there = there and held.parts[place : place + 1] == ((name, length),)
            if not there:
                self._buffer[:, slot, :, end : end + length] = part
            end += length
        self._held[slot] = _Slot(tuple((name, part.shape[2]) for name, part in parts), end)

    def name(self, slot: int, parts: Sequence[tuple[bytes, int]], start: int) -> None:
        """Say that what a slot holds from `start` on are parts of these names and lengths."""
        held = self._held.get(slot, _EMPTY)
        if held.size == start:
            self._held[slot] = _Slot((*held.parts, *parts), held.written)

    def extend(self, slot: int, start: int, end: int) -> None:
        """Say that positions `start` to `end` of a slot are about to be written."""
        self._held[slot] = self._held.get(slot, _EMPTY).within(start, end)

    def spare(self, slot: int) -> int:
        """A position of a slot that may be written without harm to what the slot holds.

        A slot that is full to its end belongs to nobody who still writes (that one would have room left), so it is
        emptied.
        """
        written = self._held.get(slot, _EMPTY).written
        if written < self.length:
            return written
        self._held.pop(slot)
        return 0

    def spread(self, slot: int, count: int, length: int, written: int) -> None:
        """Let `count` slots from `slot` on hold its first `length` positions; they will write up to `written`."""
        held = self._held.get(slot, _EMPTY).within(length, written)
        for target in range(slot + 1, slot + count):
            there = self._held.pop(target, _EMPTY).parts
            start = held.size if there[: len(held.parts)] == held.parts else 0
            self._buffer[:, target, :, start:length] = self._buffer[:, slot, :, start:length]
        self._held.update(dict.fromkeys(range(slot, slot + count), held))

    def branch(self, slot: int, parents: Sequence[int], start: int, end: int) -> None:
        """Let slot `slot + i` hold what `slot + parents[i]` holds at positions `start` to `end`."""
        if list(parents) != list(range(len(parents))):
            found = self._buffer[:, [slot + parent for parent in parents], :, start:end]
            self._buffer[:, slot : slot + len(parents), :, start:end] = found

    def read(self, slot: int, start: int, end: int) -> KV:
        """Copy of positions `start` to `end` of a slot."""
        return self._buffer[:, slot, :, start:end].copy()

    def write(self, slot: int, start: int, part: KV) -> None:
        """Put keys and values into a slot at `start`, where a prefill would write."""
        end = start + part.shape[2]
        self.extend(slot, start, end)
        self._buffer[:, slot, :, start:end] = part

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another, and what is known of them."""
        held = self._held.get(source, _EMPTY)
        self._held.pop(target, None)
        self._buffer[:, target, :, :length] = self._buffer[:, source, :, :length]
        self._held[target] = held.within(length, length)


def _round(length: int) -> int:
    """Buffer lengths are powers of two, so that a buffer seldom moves."""
    return max(LEAST_LENGTH, 1 << (length - 1).bit_length())


class Owner(Hashable, Protocol):
    """What things are derived from: a loaded prompt."""

    @property
    def removed(self) -> bool:
        """Whether it is gone, so that nothing derived from it may stay."""


class PrefixCache:
    """What is resident of prompts and texts, within one budget in bytes. Safe from any thread.

    Entries are what is derived from prompts. Blocks are keys and values of texts: a block's name covers all that stands
    in front of it too, so blocks form a tree. Of each kind the least recently used goes first, and blocks go before
    entries: a prompt is asked for more often than a text.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, KV] = OrderedDict()
        self._blocks: OrderedDict[bytes, tuple[KV, Owner | None]] = OrderedDict()
        """With the prompt that a block depends on. No block is used later than those in front of it."""
        self._block_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> KV | None:
        """The prefix, now the most recently used; None if it is not resident."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
            else:
                self._entries.move_to_end(key)
            return found

    def put(self, key: Hashable, prefix: KV) -> None:
        """Keep a prefix; one larger than the whole budget is not kept."""
        with self._lock:
            self._drop(key)
            if prefix.nbytes > self.budget:
                return
            self._make_room(prefix.nbytes)
            while self.size + prefix.nbytes > self.budget:
                _, old = self._entries.popitem(last=False)
                self.size -= old.nbytes
            self._entries[key] = prefix
            self.size += prefix.nbytes

    def find_blocks(self, names: Sequence[bytes]) -> list[KV]:
        """As many of the blocks, from the first on, as are resident."""
        with self._lock:
            found = []
            for name in names:
                block = self._blocks.get(name)
                if block is None:
                    break
                found.append(block[0])
            self._touch(names[: len(found)])
            return found

    def put_blocks(self, names: Sequence[bytes], blocks: Sequence[KV], owner: Owner | None) -> None:
        """Keep the blocks of the last of `names`, as many as there is room for beside the entries.

        Args:
            names: of all blocks from the first on.
            blocks: those that were computed: the last ones.
            owner: the prompt that they depend on.
        """
        with self._lock:
            if owner is not None and owner.removed:  # while they were computed
                return
            self._touch(names)
            first = len(names) - len(blocks)
            room = self.room
            room -= sum(self._blocks[name][0].nbytes for name in names[:first] if name in self._blocks)
            for name, block in zip(names[first:], blocks, strict=True):
                self._drop_block(name)
                room -= block.nbytes
                if room < 0:
                    break
                self._make_room(block.nbytes)
                self._blocks[name] = block, owner
                self.size += block.nbytes
                self._block_bytes += block.nbytes
            self._touch(names)

    def derive(self, owner: Owner, part: str, make: Callable[[], KV]) -> KV:
        """A part of what is derived from an owner; made where it is not resident, and kept while its owner is there."""
        key = (owner, part)
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
            if owner.removed:  # while it was made
                self.remove(key)
        return found

    def forget(self, owner: Owner, parts: Iterable[str]) -> None:
        """Drop what is derived from an owner."""
        for part in parts:
            self.remove((owner, part))
        with self._lock:
            for name in [name for name, (_, other) in self._blocks.items() if other is owner]:
                self._drop_block(name)

    @property
    def room(self) -> int:
        """Bytes for blocks: what entries leave of the budget."""
        return max(0, self.budget - (self.size - self._block_bytes))

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes of entries fit without putting an entry out."""
        return self.size - self._block_bytes + size <= self.budget

    def remove(self, key: Hashable) -> None:
        """Forget a prefix, if it is there."""
        with self._lock:
            self._drop(key)

    def _touch(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)

    def _make_room(self, size: int) -> None:
        """Put out blocks for `size` more bytes."""
        while self._blocks and self.size + size > self.budget:
            self._drop_block(next(iter(self._blocks)))

    def _drop(self, key: Hashable) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self.size -= old.nbytes

    def _drop_block(self, name: bytes) -> None:
        old = self._blocks.pop(name, None)
        if old is not None:
            self.size -= old[0].nbytes
            self._block_bytes -= old[0].nbytes
