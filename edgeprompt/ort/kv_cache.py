"""Keys and values: one growing buffer with a slot per running row, and the resident prefixes of prompts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class _Slot:
    """What a slot holds: the one record that placing, moving and filling up a step go by."""

    prefix: KV | None = None
    """Intact at the slot's start: sequences write behind it only, so the next one may use it as it is."""
    written: int = 0
    """Positions that a prefill still needs; a sequence that fills up a step writes at this one or behind it."""


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
            slot: held for slot, held in self._held.items() if slot < used and max(held.written, _size(held)) <= kept
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

    def place(self, slot: int, prefix: KV | None) -> None:
        """Begin a slot with a prefix [2 * num_layers, heads, length, head_size]; one that is still there stays."""
        if prefix is not None and self._held.get(slot, _EMPTY).prefix is not prefix:
            self._held.pop(slot, None)  # should the copy fail, the slot holds nothing
            self._buffer[:, slot, :, : prefix.shape[2]] = prefix
        self._held[slot] = _Slot(prefix, 0 if prefix is None else prefix.shape[2])

    def extend(self, slot: int, start: int, end: int) -> None:
        """Say that positions `start` to `end` of a slot are about to be written."""
        held = self._held.get(slot, _EMPTY)
        self._held[slot] = _Slot(held.prefix if _size(held) <= start else None, end)

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
        held = self._held.get(slot, _EMPTY)
        held = _Slot(held.prefix if _size(held) <= length else None, written)
        for target in range(slot + 1, slot + count):
            there = self._held.pop(target, _EMPTY).prefix
            start = _size(held) if there is held.prefix else 0
            self._buffer[:, target, :, start:length] = self._buffer[:, slot, :, start:length]
        self._held.update(dict.fromkeys(range(slot, slot + count), held))

    def branch(self, slot: int, parents: Sequence[int], start: int, end: int) -> None:
        """Let slot `slot + i` hold what `slot + parents[i]` holds at positions `start` to `end`."""
        if list(parents) != list(range(len(parents))):
            found = self._buffer[:, [slot + parent for parent in parents], :, start:end]
            self._buffer[:, slot : slot + len(parents), :, start:end] = found

    def read(self, slot: int, length: int) -> KV:
        """Copy of the first `length` positions of a slot."""
        return self._buffer[:, slot, :, :length].copy()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another, and what is known of them."""
        held = self._held.get(source, _EMPTY)
        self._held.pop(target, None)
        self._buffer[:, target, :, :length] = self._buffer[:, source, :, :length]
        self._held[target] = _Slot(held.prefix if _size(held) <= length else None, length)


def _size(held: _Slot) -> int:
    return 0 if held.prefix is None else held.prefix.shape[2]


def _round(length: int) -> int:
    """Buffer lengths are powers of two, so that a buffer seldom moves."""
    return max(LEAST_LENGTH, 1 << (length - 1).bit_length())


class Owner(Hashable, Protocol):
    """What things are derived from: a loaded prompt."""

    @property
    def removed(self) -> bool:
        """Whether it is gone, so that nothing derived from it may stay."""


class PrefixCache:
    """Resident prefixes, least recently used first out, within a budget in bytes. Safe from any thread."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, KV] = OrderedDict()
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
            while self.size + prefix.nbytes > self.budget:
                _, old = self._entries.popitem(last=False)
                self.size -= old.nbytes
            self._entries[key] = prefix
            self.size += prefix.nbytes

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

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes fit without putting anything out."""
        return self.size + size <= self.budget

    def remove(self, key: Hashable) -> None:
        """Forget a prefix, if it is there."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self.size -= old.nbytes
