"""How far apart two cores are: nanoseconds that a message between them takes there and back.

On a virtual machine it changes while one measures: the host may place two virtual cores on one cache or on two. What
threads share then takes several times as long to reach the other (60 and 350 ns were seen within a minute, and with
them 19 and 30 ms for the same prefill on two threads).
"""

from __future__ import annotations

import os
import statistics
import time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory

ROUNDS = 2000
PATIENCE = 1_000_000_000
"""Nanoseconds after which one looks whether the other process is still there."""
APART = 1.6
"""Cores are apart where a message between them takes this many times as long as it did at best."""


def _answer(name: str, core: int) -> None:
    os.sched_setaffinity(0, {core})
    memory = SharedMemory(name)
    cell = memory.buf
    for turn in range(1, ROUNDS + 1):
        odd = turn & 1
        while cell[0] != odd:
            pass
        cell[64] = odd
    del cell
    memory.close()


def round_trip() -> float | None:
    """Median nanoseconds between the first two usable cores.

    None with one core, where cores cannot be chosen, or where the process on the other core does not start.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        return None
    first, second = sorted(before)[:2]
    memory = SharedMemory(create=True, size=128)
    cell, samples = memory.buf, []
    cell[0] = cell[64] = 0
    other = get_context("spawn").Process(target=_answer, args=(memory.name, second))
    other.start()
    try:
        os.sched_setaffinity(0, {first})
        for turn in range(1, ROUNDS + 1):
            odd = turn & 1
            started = time.perf_counter_ns()
            cell[0] = odd
            while cell[64] != odd:
                if time.perf_counter_ns() - started > PATIENCE and not other.is_alive():
                    return None
            samples.append(time.perf_counter_ns() - started)
    finally:
        os.sched_setaffinity(0, before)
        other.join()
        del cell
        memory.close()
        memory.unlink()
    return statistics.median(samples)
