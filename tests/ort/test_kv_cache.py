from __future__ import annotations

import numpy as np
import pytest

from edgeprompt.ort.kv_cache import KVShape, PrefixCache, SlotCache

SHAPE = KVShape(num_layers=2, num_heads=3, head_size=4, dtype="float32")


def prefix(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 3, length, 4)).astype(np.float32)


def test_bytes_per_position() -> None:
    assert SHAPE.bytes_per_position == 2 * 2 * 3 * 4 * 4
    assert KVShape(2, 3, 4, "float16").bytes_per_position == 2 * 2 * 3 * 4 * 2


def test_prompt_file_layout_becomes_cache_layout() -> None:
    past = np.arange(2 * 2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 2, 3, 5, 4)
    found = SHAPE.prefix(past)
    assert found.shape == (4, 3, 5, 4)
    assert (found[3] == past[1, 1]).all()
    assert KVShape(2, 3, 4, "float16").prefix(past).dtype == np.float16


def test_rows_survive_growth_of_slots_and_of_length() -> None:
    cache = SlotCache(SHAPE, max_slots=8, budget=1 << 24)
    cache.reserve(1, 10, 0)
    first = prefix(10, 1)
    cache.place(0, [(b"first", first)])
    cache.reserve(2, 10, 1)
    second = prefix(256, 2)
    cache.place(1, [(b"second", second)])
    generation = cache.generation
    cache.reserve(2, 256, 2)
    assert cache.generation == generation  # it fits: nothing moves
    cache.reserve(3, 300, 2)
    assert (cache.slots, cache.length) == (4, 512)
    assert cache.generation == generation + 1
    assert (cache.read(0, 0, 10) == first).all()
    assert (cache.read(1, 0, 256) == second).all()


def test_move_and_pointer() -> None:
    cache = SlotCache(SHAPE, max_slots=4, budget=1 << 24)
    cache.reserve(3, 8, 0)
    block = prefix(8)
    cache.place(2, [(b"block", block)])
    cache.move(2, 0, 8)
    assert (cache.read(0, 0, 8) == block).all()
    assert cache.pointer(1, 2) - cache.pointer(1, 0) == 2 * 3 * cache.length * 4 * 4
    assert cache.pointer(1, 0) - cache.pointer(0, 0) == cache.slots * 3 * cache.length * 4 * 4


def test_budget_bounds_slots_times_length() -> None:
    cache = SlotCache(SHAPE, max_slots=4, budget=3 * 256 * SHAPE.bytes_per_position)
    assert cache.fits(3, 256)
    assert not cache.fits(4, 256)
    assert not cache.fits(2, 257)
    assert not SlotCache(SHAPE, max_slots=2, budget=1 << 30).fits(3, 10)
    cache.reserve(3, 100, 0)
    assert cache.slots == 3  # rounding up to four would exceed the budget


def test_shrink_frees_what_a_long_row_took() -> None:
    cache = SlotCache(SHAPE, max_slots=4, budget=1 << 24)
    cache.reserve(2, 5000, 0)
    cache.shrink(1024, 4)
    assert (cache.slots, cache.length) == (0, 0)
    cache.reserve(1, 100, 0)
    cache.shrink(1024, 4)
    assert cache.slots == 1


def test_prefix_cache_puts_out_the_least_recently_used() -> None:
    blocks = {key: prefix(10, ord(key)) for key in "abc"}
    cache = PrefixCache(budget=2 * blocks["a"].nbytes)
    cache.put("a", blocks["a"])
    cache.put("b", blocks["b"])
    assert cache.get("a") is blocks["a"]
    cache.put("c", blocks["c"])
    assert cache.get("b") is None
    assert cache.get("a") is blocks["a"]
    assert cache.size == 2 * blocks["a"].nbytes
    assert cache.misses == 1
    assert not cache.has_room(1)
    cache.remove("a")
    cache.remove("a")
    assert cache.has_room(blocks["a"].nbytes)
    cache.put("c", blocks["b"])
    assert cache.get("c") is blocks["b"]
    assert cache.size == blocks["b"].nbytes


@pytest.mark.parametrize("budget", [0, 100])
def test_prefix_larger_than_the_budget_is_not_kept(budget: int) -> None:
    cache = PrefixCache(budget)
    cache.put("a", prefix(10))
    assert cache.get("a") is None
    assert cache.size == 0
