"""Fewer threads where that is quicker: decisions on a simulated device, and real sessions that are changed at work."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeprompt
from edgeprompt import EngineOptions, GenerationOptions, Request
from edgeprompt.ort import processor, session
from edgeprompt.ort.threads import FIRST_WAIT, LONGEST_WAIT, AdaptiveThreads

IDS = [5, 9, 13, 7, 21, 8, 6, 30, 41, 12]


class Device:
    """Steps on two cores, of which another program may take one."""

    def __init__(self, step: float, one: float, two_busy: float, seed: int) -> None:
        self.now = 0.0
        self._random = random.Random(seed)
        self._costs = {
            (2, False): (step, 2.0),
            (1, False): (step * one, 1.0),
            (2, True): (step * two_busy, 1.5),
            (1, True): (step * one, 0.97),
        }

    def run(self, threads: int, busy: bool) -> tuple[float, float]:
        """Seconds and processor seconds of a step."""
        seconds, share = self._costs[threads, busy]
        seconds *= self._random.uniform(0.8, 1.25)
        self.now += seconds
        return seconds, share * seconds


def steps_in(seconds: float, device: Device, choice: AdaptiveThreads | None, threads: int, busy: bool) -> int:
    """How many steps a time has room for, and what the choice makes of them; None: always `threads`."""
    end, count = device.now + seconds, 0
    while device.now < end:
        took, cpu = device.run(threads if choice is None else choice.threads, busy)
        if choice is not None:
            choice.count(("step", 1), 1, took, cpu, device.now)
        count += 1
    return count


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from([0.004, 0.012, 0.06]),
    one=st.floats(1.3, 2.0),
    two_busy=st.floats(1.3, 3.5),
    seed=st.integers(0, 1000),
)
def test_a_simulated_device_runs_nearly_as_quickly_as_on_the_better_number(
    step: float, one: float, two_busy: float, seed: int
) -> None:
    device = Device(step, one, two_busy, seed)
    choice = AdaptiveThreads("two", 2, lambda threads: str(threads))
    for busy in (False, True, False, True):
        steps_in(4 * LONGEST_WAIT, device, choice, 0, busy)
        time.sleep(0.002)  # the other session opens in the background
        adapted = steps_in(40, device, choice, 0, busy)
        best = max(steps_in(40, device, None, threads, busy) for threads in (1, 2))
        assert adapted >= 0.93 * best, (busy, adapted, best)


def test_a_quiet_device_stays_on_all_threads_and_opens_nothing() -> None:
    opened: list[int] = []
    device = Device(0.01, 1.7, 2.5, 0)
    choice = AdaptiveThreads("two", 2, lambda threads: opened.append(threads))
    steps_in(30, device, choice, 0, False)
    assert choice.threads == 2
    assert not opened


def test_without_room_for_another_session_the_first_stays() -> None:
    device = Device(0.01, 1.2, 3.0, 0)
    choice = AdaptiveThreads("two", 2, lambda threads: None)
    for _ in range(20):
        steps_in(FIRST_WAIT, device, choice, 0, True)
        time.sleep(0.001)
    assert choice.session == "two"


def test_a_session_that_does_not_open_is_not_asked_for_again() -> None:
    asked: list[int] = []

    def fail(threads: int) -> Any:
        asked.append(threads)
        raise RuntimeError("no memory")

    device = Device(0.01, 1.2, 3.0, 0)
    choice = AdaptiveThreads("four", 4, fail)
    device._costs |= {(4, True): (0.03, 3.0), (3, True): (0.02, 3.0)}
    for _ in range(20):
        steps_in(FIRST_WAIT, device, choice, 0, True)
        time.sleep(0.001)
    assert choice.session == "four"
    assert asked == [3, 1]


def test_other_work_is_not_compared() -> None:
    choice = AdaptiveThreads("two", 2, lambda threads: str(threads))
    now = 0.0

    def runs(kind: str, seconds: float) -> None:
        nonlocal now
        for _ in range(10):
            now += seconds
            choice.count((kind, 1), 1, seconds, seconds, now)
        time.sleep(0.002)

    for _ in range(3):
        runs("step", 0.05)
    assert choice.threads == 1  # a try
    runs("prefill", 0.001)
    runs("prefill", 0.03)
    assert choice.threads == 2


@contextmanager
def adapting(
    package: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> Iterator[tuple[Any, list[AdaptiveThreads]]]:
    """A runtime whose sessions take the other number of threads at every run."""
    made: list[AdaptiveThreads] = []

    class Restless(AdaptiveThreads):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

        def count(self, *_: Any) -> None:
            wanted = (self._level + 1) % len(self._levels)
            self._sessions.setdefault(self._levels[wanted], None)
            if self._sessions[self._levels[wanted]] is None:
                self._sessions[self._levels[wanted]] = self._open(self._levels[wanted])
            self._level = wanted

    monkeypatch.setattr(session, "AdaptiveThreads", Restless)
    monkeypatch.setattr(processor, "cores", lambda: 2)
    with edgeprompt.load(package, options=EngineOptions(provider="cpu", **more)) as runtime:
        yield runtime, made


def threads_of(ort: Any) -> int:
    return int(ort.get_session_options().intra_op_num_threads)


def test_a_decoder_goes_on_with_the_same_cache(tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgeprompt.load(tiny_llama_package, options=EngineOptions(provider="cpu", threads=1)) as runtime:
        alone = [runtime.generate(input_ids=IDS[:count], max_new_tokens=20) for count in (1, 4, 10)]
        logits = runtime.logits(input_ids=IDS)
    with adapting(tiny_llama_package, monkeypatch) as (runtime, made):
        requests = [
            Request(input_ids=IDS[:count], options=GenerationOptions(max_new_tokens=20)) for count in (1, 4, 10)
        ]
        for found, expected in zip(runtime.run(requests), alone, strict=True):
            assert found.token_ids == expected.token_ids
        assert np.array_equal(runtime.logits(input_ids=IDS), logits)
        (choice,) = made
        assert sorted(map(threads_of, choice.sessions)) == [0, 1]  # 0: ONNX Runtime's own number


@pytest.mark.parametrize("family", ["BERT"])
def test_an_encoder(family: str, encoder_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    package = encoder_package(family)
    with edgeprompt.load(package, options=EngineOptions(provider="cpu", threads=1)) as runtime:
        alone = [runtime.embed(input_ids=[IDS[:count]]) for count in (3, 6, 10)]
    with adapting(package, monkeypatch) as (runtime, made):
        for count, expected in zip((3, 6, 10), alone, strict=True):
            assert np.array_equal(runtime.embed(input_ids=[IDS[:count]]), expected)
        assert [len(choice.sessions) for choice in made] == [2]


@pytest.mark.parametrize("family", ["T5", "BART"])
def test_an_encoder_decoder(family: str, seq2seq_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    package = seq2seq_package(family)
    with edgeprompt.load(package, options=EngineOptions(provider="cpu", threads=1)) as runtime:
        alone = [runtime.generate(input_ids=IDS[:count], max_new_tokens=12).token_ids for count in (3, 10)]
    with adapting(package, monkeypatch) as (runtime, made):
        found = [runtime.generate(input_ids=IDS[:count], max_new_tokens=12).token_ids for count in (3, 10)]
        assert found == alone
        assert [len(choice.sessions) for choice in made] == [2, 2]


def test_a_number_that_was_given_is_kept(tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given_options in ({"threads": 2}, {"workers": 2}):
        with adapting(tiny_llama_package, monkeypatch, **given_options) as (runtime, made):
            runtime.logits(input_ids=IDS)
            assert not made


def test_memory_decides_whether_weights_are_packed_twice(
    tiny_llama_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "free_memory", lambda: 1)
    with adapting(tiny_llama_package, monkeypatch) as (runtime, made):
        runtime.logits(input_ids=IDS)
        assert made[0]._open(1) is None
    with adapting(tiny_llama_package, monkeypatch, cache_folder=tmp_path) as (runtime, made):
        runtime.logits(input_ids=IDS)
        packed = any(tmp_path.glob("graph-*/packed"))
        assert (made[0]._open(1) is not None) == packed
