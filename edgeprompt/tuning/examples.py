"""Tokenised examples: spooled to a temporary file, mapped, split, sampled and grouped into batches of like length."""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_FLUSH = 1 << 20
_POOL = 64
"""Batches whose examples are sorted by length together."""


@dataclass(frozen=True)
class Example:
    """One example: token ids (virtual ids included), what the loss compares with, and segments where not all are 0."""

    ids: list[int]
    target: list[int]
    types: list[int] = field(default_factory=list)
    group: int = -1
    """Its class, where every example has one: few-shot and held-out examples are drawn class by class."""


class Examples:
    """Examples on disk, mapped; memory holds three offsets and a group for each."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """Spool `examples` to a temporary file, one at a time."""
        pending, bounds, groups = array("i"), array("q", [0]), array("i")
        with tempfile.TemporaryFile() as file:
            for example in examples:
                for values in (example.ids, example.target, example.types):
                    pending.extend(values)
                    bounds.append(bounds[-1] + len(values))
                groups.append(example.group)
                if len(pending) > _FLUSH:
                    pending.tofile(file)
                    pending = array("i")
            pending.tofile(file)
            file.flush()
            self._values = np.memmap(file, np.int32, "r")
        self._bounds = np.array(bounds, np.int64)
        self.groups = np.array(groups, np.int32)
        """Class of each example, -1 where it has none, int32 [len(self)]."""
        self.lengths = np.diff(self._bounds)[::3] + np.diff(self._bounds)[1::3]
        """Number of ids and targets of each example, int64 [len(self)]."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Example:
        bounds = self._bounds[3 * index : 3 * index + 4]
        ids, target, types = (self._values[start:end].tolist() for start, end in itertools.pairwise(bounds))
        return Example(ids, target, types, int(self.groups[index]))


def split(
    groups: npt.NDArray[np.int32], fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices for training and for evaluation, drawn by the seed: of every group its share, never its last example.

    Evaluation gets at least one example where some group has two.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(groups))
    shares, spare = np.empty(len(groups)), np.ones(len(groups), bool)
    for group in np.unique(groups):
        places = np.flatnonzero(groups[order] == group)
        shares[places] = (np.arange(len(places)) + 0.5) / len(places)
        spare[places[-1]] = False
    wanted = max(1, round(len(groups) * fraction)) if fraction > 0 else 0
    chosen = np.argsort(shares, kind="stable")
    held = order[chosen[spare[chosen]][:wanted]]
    return np.setdiff1d(order, held), np.sort(held)


def few_shot(
    indices: npt.NDArray[np.int64], classes: npt.NDArray[np.int32], shots: int, seed: int
) -> npt.NDArray[np.int64]:
    """At most `shots` of `indices` for each class, drawn by the seed."""
    order = np.random.default_rng([seed, 2]).permutation(indices)
    taken = [order[classes[order] == kind][:shots] for kind in np.unique(classes[order])]
    return np.sort(np.concatenate(taken))


def sample(indices: npt.NDArray[np.int64], limit: int, seed: int) -> npt.NDArray[np.int64]:
    """At most `limit` of `indices`, drawn by the seed."""
    return np.sort(np.random.default_rng([seed, 3]).permutation(indices)[:limit])


class BatchPlan:
    """Which examples each step sees: shuffled by (seed, epoch), grouped by length, the same on every run.

    Every batch is full: what is left over at the end of an epoch is filled up from the epoch's first examples.
    """

    def __init__(
        self, indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_size: int, seed: int
    ) -> None:
        self._indices, self._lengths, self._seed = indices, lengths, seed
        self.batch_size = min(batch_size, len(indices))
        self.batches_per_epoch = -(-len(indices) // self.batch_size)
        self._epoch = -1
        self._batches: list[npt.NDArray[np.int64]] = []

    def batch(self, step: int) -> Sequence[int]:
        """Example indices of step 0, 1, 2, ..."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return [int(index) for index in self._batches[place]]

    def _shuffled(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        random = np.random.default_rng([self._seed, 4, epoch])
        order = random.permutation(self._indices)
        order = np.concatenate([order, order])[: self.batches_per_epoch * self.batch_size]
        pool = self.batch_size * _POOL
        batches: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += np.split(part, len(part) // self.batch_size)
        return [batches[index] for index in random.permutation(len(batches))]


def sorted_batches(
    indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_size: int
) -> Iterator[list[int]]:
    """All of `indices` once, in batches of like length."""
    order = indices[np.argsort(lengths[indices], kind="stable")]
    for start in range(0, len(order), batch_size):
        yield [int(index) for index in order[start : start + batch_size]]
