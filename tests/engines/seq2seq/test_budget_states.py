"""Encoder-decoders under any order of asking, cancelling and waiting, with memory for few: answers and bytes held."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import edgeprompt
from edgeprompt import CapacityError, GenerationOptions, Request, RequestCancelledError, Runtime
from tests.support.runtimes import QUIET

TEXTS = ("the film", "a", "it was a long day and the work was not done at all", "we said so")
RUNS, STEPS = 15, 20
LONGEST = 80
"""New tokens of four beams, which no budget of this test holds."""


class Machine(RuleBasedStateMachine):
    """What is answered is what the runtime with memory for all says of the request alone."""

    runtime: Runtime
    alone: Callable[[str, int, int], list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.flights: list[tuple[Any, tuple[str, int, int]]] = []
        self.streams: list[tuple[Any, list[str], str]] = []

    @rule(text=st.sampled_from(TEXTS), tokens=st.integers(1, 12), beams=st.sampled_from([1, 1, 2]))
    def ask(self, text: str, tokens: int, beams: int) -> None:
        options = GenerationOptions(max_new_tokens=tokens, num_beams=beams)
        self.flights.append((self.runtime.submit(Request(text, options=options)), (text, tokens, beams)))

    @rule()
    def ask_too_much(self) -> None:
        with pytest.raises(CapacityError, match="kv_budget"):
            self.runtime.generate(TEXTS[0], max_new_tokens=LONGEST, num_beams=4)

    @rule(text=st.sampled_from(TEXTS), tokens=st.integers(1, 8))
    def stream(self, text: str, tokens: int) -> None:
        """Begun, and left open: it must not keep others waiting."""
        if len(self.streams) < 2:
            pieces = self.runtime.stream(Request(text, options=GenerationOptions(max_new_tokens=tokens)))
            next(pieces, None)
            self.streams.append((pieces, [], text))

    @rule()
    def drop_a_stream(self) -> None:
        if self.streams:
            self.streams.pop(0)[0].close()

    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        if self.flights:
            job, _ = self.flights.pop(which % len(self.flights))
            job.cancel()
            with contextlib.suppress(RequestCancelledError):
                job.result(timeout=30)

    @rule(which=st.integers(0, 9))
    def wait(self, which: int) -> None:
        if self.flights:
            job, asked = self.flights.pop(which % len(self.flights))
            assert list(job.result(timeout=30).token_ids) == self.alone(*asked)

    @invariant()
    def no_more_is_held_than_there_is(self) -> None:
        budget = self.runtime._engine._budget  # type: ignore[attr-defined]
        assert 0 <= budget.held <= budget.total

    def teardown(self) -> None:
        for pieces, *_ in self.streams:
            pieces.close()
        for job, asked in self.flights:
            assert list(job.result(timeout=30).token_ids) == self.alone(*asked)
        # A last request begins when all others have left: what they held is free again.
        assert list(self.runtime.generate(TEXTS[2], max_new_tokens=12).token_ids) == self.alone(TEXTS[2], 12, 1)


@pytest.mark.parametrize("family", ["T5", "BART"])
def test_answers_and_bytes(family: str, seq2seq_package: Callable[..., Path]) -> None:
    package = seq2seq_package(family)
    known: dict[tuple[str, int, int], list[int]] = {}
    with edgeprompt.load(package, options=QUIET) as plain:

        def alone(text: str, tokens: int, beams: int) -> list[int]:
            key = text, tokens, beams
            if key not in known:
                known[key] = list(plain.generate(text, max_new_tokens=tokens, num_beams=beams).token_ids)
            return known[key]

        lane = plain._engine._lanes[0]  # type: ignore[attr-defined]
        job = plain._engine.prepare(
            Request(TEXTS[2], options=GenerationOptions(max_new_tokens=12, num_beams=2)), None, None
        )
        budget = lane.bytes([job]) + lane.bytes([job]) // 3  # for the largest request and a small one
        with edgeprompt.load(package, options=dataclasses.replace(QUIET, kv_budget=budget)) as runtime:

            class Bound(Machine):
                pass

            Bound.runtime, Bound.alone = runtime, staticmethod(alone)  # type: ignore[assignment]
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                Bound,
                settings=settings(
                    max_examples=RUNS, stateful_step_count=STEPS, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck),
                ),
            )  # fmt: skip
