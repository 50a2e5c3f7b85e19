"""The blocks of texts in the prefix cache, in any order of events, against a model that computes every block anew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgeprompt.ort.kv_cache import PrefixCache


class Prompt:
    """What blocks and entries belong to."""

    def __init__(self) -> None:
        self.removed = False


def names_of(text: Sequence[int]) -> list[bytes]:
    """A block for each letter; its name covers all letters up to it."""
    return [hashlib.sha256(bytes(text[: end + 1])).digest() for end in range(len(text))]


def computed(name: bytes) -> np.ndarray:
    """The one block that has this name."""
    seed = int.from_bytes(name[:4], "big")
    return np.random.default_rng(seed).normal(size=(2, 1, 4, 2)).astype(np.float32)


SIZE = computed(b"1234").nbytes
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


class Tree(RuleBasedStateMachine):
    """Texts are inserted, forked and evicted; a computation may be cancelled half-way; prompts go."""

    @initialize(blocks=st.integers(0, 12))
    def begin(self, blocks: int) -> None:
        self.cache = PrefixCache(blocks * SIZE)
        self.prompts = [Prompt(), Prompt()]
        self.seen: list[list[int]] = [[0]]

    def ask(self, text: list[int], steps: int, owner: Prompt | None) -> None:
        """Reuse what is there, compute the next `steps` blocks one by one, keep each."""
        names = names_of(text)
        found = self.cache.find_blocks(names)
        assert len(found) <= len(names)
        for name, block in zip(names, found, strict=False):
            assert (block == computed(name)).all()
        for place in range(len(found), min(len(names), len(found) + steps)):
            self.cache.put_blocks(names[: place + 1], [computed(names[place])], owner)
        self.seen.append(text)

    @rule(text=TEXTS, cancelled=st.integers(0, 8), owner=st.sampled_from([None, 0, 1]))
    def insert(self, text: list[int], cancelled: int, owner: int | None) -> None:
        self.ask(text, cancelled or len(text), None if owner is None else self.prompts[owner])

    @rule(which=st.integers(0, 50), cut=st.integers(1, 8), tail=TEXTS)
    def fork(self, which: int, cut: int, tail: list[int]) -> None:
        self.ask([*self.seen[which % len(self.seen)][:cut], *tail], 16, None)

    @rule(text=TEXTS)
    def insert_at_once(self, text: list[int]) -> None:
        names = names_of(text)
        there = len(self.cache.find_blocks(names))
        self.cache.put_blocks(names, [computed(name) for name in names[there:]], None)
        kept = self.cache.find_blocks(names)
        room = (self.cache.budget - sum(entry.nbytes for entry in self.cache._entries.values())) // SIZE
        assert len(kept) >= min(len(names), room)  # what was computed last is there, as far as there is room

    @rule(key=st.integers(0, 3), blocks=st.integers(1, 4))
    def derive(self, key: int, blocks: int) -> None:
        """Entries of prompts come before blocks."""
        before = [*self.cache._entries]
        entry = np.zeros(blocks * SIZE, np.int8)
        self.cache.put((self.prompts[0], str(key)), entry)
        if len(self.cache._entries) < len({*before, (self.prompts[0], str(key))}):
            assert not self.cache._blocks or entry.nbytes > self.cache.budget

    @precondition(lambda self: not self.prompts[1].removed)
    @rule()
    def forget(self) -> None:
        self.prompts[1].removed = True
        self.cache.forget(self.prompts[1], ["0"])

    @invariant()
    def sizes_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        blocks = sum(block.nbytes for block, _ in self.cache._blocks.values())
        entries = sum(entry.nbytes for entry in self.cache._entries.values())
        assert self.cache._block_bytes == blocks
        assert self.cache.size == blocks + entries <= self.cache.budget
        assert all(owner is None or not owner.removed for _, owner in self.cache._blocks.values())

    @invariant()
    def no_block_is_evicted_before_those_behind_it(self) -> None:
        if not hasattr(self, "cache"):
            return
        order = {name: place for place, name in enumerate(self.cache._blocks)}
        for text in self.seen:
            places = [order[name] for name in names_of(text) if name in order]
            assert places == sorted(places, reverse=True)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None)
