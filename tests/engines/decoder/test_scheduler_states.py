"""The scheduler, its slots and its prefixes in any order of events, against a model that computes all from scratch.

The test decides when the scheduler's thread takes a step: the real graph's `prefill` and `decode` wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import edgeprompt
from edgeprompt import Request, RequestCancelledError, Runtime, names
from edgeprompt.decoding import strategies as decoding
from edgeprompt.decoding.drafts import PromptLookup
from edgeprompt.engines import scheduler
from edgeprompt.engines.decoder import graph as decoder_graph
from edgeprompt.engines.decoder import lane, prefixes
from edgeprompt.ort import kv_cache
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from edgeprompt.request import GenerationOptions
from tests.support.packages import growing_package
from tests.support.prompts import make_infix, make_prompt
from tests.support.runtimes import QUIET

WORDS = {"x": (" good", " good story", " very good actors"), "y": (" bad", " never ever made")}
PROMPTS = (None, "rows", "more", "deep", "infix")
TEXTS = ("a", "a story of a man who never went home", "a story of a man who was good", "a story of")
TOLERANCE = 1e-4
KINDS = ("in place", "batch invariant", "growing", "drafts")


class BrokenError(RuntimeError):
    """What a prefill that the test breaks raises."""


def prompts_of(manifest: Manifest) -> dict[str, PromptFile]:
    found = [
        make_prompt(manifest, "rows", verbalizer=WORDS, count=5),
        make_prompt(manifest, "more", seed=1, count=9),
        make_prompt(manifest, "deep", "prefix-tuning", seed=2, count=6),
        make_infix(manifest, "infix", "{text}{prompt}\nA:", seed=3),
    ]
    return {prompt.name: prompt for prompt in found}


class Scratch:
    """Answers by running prompt, text and answer through a plain session, nothing kept from one run to the next."""

    def __init__(self, package: Path) -> None:
        self._package = open_package(package)
        self._manifest = self._package.manifest
        self._session = onnxruntime.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"])
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._prompts = prompts_of(self._manifest)
        self.logprobs = cache(self._logprobs)

    def text_ids(self, prompt: str | None, text: str, task: str) -> tuple[int, ...]:
        shown = f"{text}\nA:" if prompt == "rows" else text
        ids = tuple(self._package.tokenizer.encode(shown))
        if prompt != "infix":
            return ids
        first, count = self._manifest.geometry.vocab_size, self._prompts["infix"].num_virtual_tokens
        return (*ids, *range(first, first + count), *self._package.tokenizer.encode("\nA:"))

    def _logprobs(self, prompt: str | None, ids: tuple[int, ...]) -> Any:
        """float64 [vocab_size] behind `ids`."""
        size = self._manifest.geometry
        found = self._prompts.get(prompt or "")
        rows = np.zeros((1, size.hidden_size), np.float32)
        past = np.zeros((size.num_layers, 2, size.num_key_value_heads, 0, size.head_size), np.float32)
        if found is not None and found.prompt_embeddings is not None:
            rows = found.prompt_embeddings
            ids = (*range(size.vocab_size, size.vocab_size + len(rows)), *ids)
        elif found is not None and found.is_infix:
            place = ids.index(size.vocab_size)
            front = self._run(ids[:place], rows, past)[1:]
            before = np.stack([value[0] for value in front]).reshape(*past.shape[:3], place, past.shape[4])
            past, ids = np.concatenate([before, found.past_key_values], axis=3), ids[place + found.num_virtual_tokens :]
        elif found is not None:
            past = found.past_key_values
        logits = self._run(ids, rows, past)[0][0, -1].astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    def _run(self, ids: tuple[int, ...], rows: Any, past: Any) -> Any:
        """Logits, then the keys and values of every layer."""
        size = self._manifest.geometry
        start, total = past.shape[3], past.shape[3] + len(ids)
        feeds = {
            names.INPUT_IDS: np.asarray([ids], np.int64),
            names.ATTENTION_MASK: np.ones((1, total), np.int64),
            names.POSITION_IDS: np.arange(start, total)[None],
            names.PROMPT_EMBEDDINGS: rows,
        }
        for layer in range(size.num_layers):
            for index, part in enumerate(("key", "value")):
                feeds[names.past(layer, part)] = past[layer, index][None]
        known = {name: value for name, value in feeds.items() if name in self._inputs}
        parts = [(layer, part) for layer in range(size.num_layers) for part in ("key", "value")]
        return self._session.run([names.LOGITS, *(names.present(*part) for part in parts)], known)

    def greedy(self, prompt: str | None, text: str) -> tuple[int, ...]:
        """The longest answer that is asked for."""
        ids = found = self.text_ids(prompt, text, "generate")
        while len(found) < len(ids) + 30:
            found = (*found, int(self.logprobs(prompt, found).argmax()))
        return found[len(ids) :]

    def foretell(self) -> Callable[..., tuple[list[int], float]]:
        """A `PromptLookup.draft` that knows the answers, but for every fourth token: random weights copy no text."""
        known: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prompt in PROMPTS:
            for text in TEXTS:
                read = self.text_ids(prompt, text, "generate")
                answers = known.setdefault(tuple(i for i in read if i < self._manifest.geometry.vocab_size), [])
                answers.append(self.greedy(prompt, text))

        def draft(lookup: Any, said: list[int], most: int = 7) -> tuple[list[int], float]:
            start = len(said)
            (answer, *_) = [a for a in known[tuple(lookup._history)] if a[:start] == tuple(said)] or [()]
            return [token if at % 4 else 5 for at, token in enumerate(answer[start : start + most], start)], 0.9

        return draft

    def check(self, request: Request, result: Any) -> None:
        """Hold a result against the answer from scratch."""
        ids = self.text_ids(request.prompt, request.text, request.task)
        if request.task == "classify":
            for label, words in WORDS.items():
                expected = -np.inf
                for word in words:
                    tokens = tuple(self._package.tokenizer.encode(word))
                    chances = [self.logprobs(request.prompt, ids + tokens[:n])[t] for n, t in enumerate(tokens)]
                    expected = np.logaddexp(expected, sum(chances))
                assert result.logits[label] == pytest.approx(expected, abs=TOLERANCE)
            return
        assert result.token_ids
        for place, (token, logprob) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
            chances = self.logprobs(request.prompt, ids + result.token_ids[:place])
            assert logprob == pytest.approx(chances[token], abs=TOLERANCE)
            assert chances[token] >= chances.max() - TOLERANCE


class Gate:
    """Holds a graph's runs until the test lets one through."""

    def __init__(self, graph: Any) -> None:
        self._changed = threading.Condition()
        self._arrived, self._let = 0, 0
        self._open = False
        self.break_next = False
        prefill, decode, run_ahead = graph.prefill, graph.decode, graph.run_ahead

        def gated_prefill(*arguments: Any) -> Any:
            self._wait()
            found = prefill(*arguments)
            if self.break_next:
                self.break_next = False
                raise BrokenError("the test broke this prefill")
            return found

        def gated_decode(*arguments: Any) -> Any:
            self._wait()
            return decode(*arguments)

        def gated_run_ahead(*arguments: Any) -> Any:
            self._wait()
            return run_ahead(*arguments)

        graph.prefill, graph.decode, graph.run_ahead = gated_prefill, gated_decode, gated_run_ahead

    def _wait(self) -> None:
        with self._changed:
            self._arrived += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or self._let >= self._arrived, 30)

    def settle(self, idle: Callable[[], bool]) -> None:
        """Wait until the thread stands at the gate, or has nothing to do."""
        with self._changed:
            for _ in range(3000):
                if self._arrived > self._let or idle():
                    return
                self._changed.wait(0.01)
        raise AssertionError("the scheduler neither runs nor rests")

    def let_through(self) -> None:
        with self._changed:
            if self._arrived > self._let:
                self._let += 1
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


@dataclass
class Flight:
    request: Request
    job: Any
    cancelled: bool = False
    checked: bool = field(default=False)


class Machine(RuleBasedStateMachine):
    """Requests begin, take steps, end, fail and are cancelled; prefixes are evicted."""

    def __init__(self, package: Path, scratch: Scratch, kind: str) -> None:
        super().__init__()
        options = replace(QUIET, max_batch=4, batch_invariant=kind == "batch invariant", prefix_budget=24 << 10)
        options = replace(options, drafts=kind == "drafts")
        self.scratch = scratch
        self.runtime: Runtime = edgeprompt.load(package, options=options)
        for prompt in prompts_of(self.runtime.manifest).values():
            self.runtime.add_prompt(prompt)
        self.engine: Any = self.runtime._engine
        graph = self.engine._lanes[0].graph
        graph.chunk = 8
        self.gate = Gate(graph)
        self.flights: list[Flight] = []
        self.breaks = 0

    def pending(self) -> list[Flight]:
        return [flight for flight in self.flights if not flight.job.done()]

    def idle(self) -> bool:
        return not self.pending()

    @rule(
        prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
        text=st.sampled_from(TEXTS),
        tokens=st.sampled_from((30, 8, 2, 1)),
        classify=st.booleans(),
    )
    def begin(self, prompts: list[str | None], text: str, tokens: int, classify: bool) -> None:
        options = GenerationOptions(max_new_tokens=tokens, logprobs=True)
        for prompt in prompts:
            task = "classify" if classify and prompt == "rows" else "generate"
            request = Request(text, prompt, task=task, options=options)
            self.flights.append(Flight(request, self.runtime.submit(request)))
            self.gate.settle(self.idle)

    @precondition(lambda self: self.pending())
    @rule(count=st.sampled_from((1, 4, 12)))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.gate.let_through()
            self.gate.settle(self.idle)

    @precondition(lambda self: self.pending())
    @rule(places=st.sets(st.integers(0, 3), min_size=1, max_size=2))
    def cancel(self, places: set[int]) -> None:
        pending = self.pending()
        for place in places:
            flight = pending[place % len(pending)]
            flight.job.cancel()
            flight.cancelled = True
        self.step(1)

    @rule(name=st.sampled_from([*(name for name in PROMPTS if name), ""]))
    def mishap(self, name: str) -> None:
        """The prefix of a prompt is evicted, or the next prefill breaks."""
        if name:
            self.engine.forget(self.runtime._prompts.find(name))
        elif self.pending() and not self.gate.break_next:
            self.gate.break_next = True
            self.breaks += 1

    @invariant()
    def slots_hold_what_they_are_said_to_hold(self) -> None:
        """The thread stands at the gate, so nothing is half-written."""
        cache = getattr(self.engine._lanes[0].graph, "_cache", None)
        derived, start = self.engine.derived, 0
        known = {name: block for name, (block, _) in derived._blocks.items()}
        for key, prefix in derived._entries.items():
            if key[1] == names.PAST_KEY_VALUES:
                known[key[0].sha256.encode()] = prefix
        for slot, held in cache._held.items() if cache is not None else ():
            start = 0
            for name, length in held.parts:
                if name in known:
                    # Blocks this small are the same but for rounding, whoever computed them.
                    assert np.allclose(cache.read(slot, start, start + length), known[name], atol=1e-4)
                start += length

    @invariant()
    def answers_are_those_from_scratch(self) -> None:
        for flight in self.flights:
            if flight.checked or not flight.job.done():
                continue
            flight.checked = True
            error = flight.job.exception()
            if error is not None and isinstance(error.__cause__, BrokenError):
                self.breaks -= 1
                assert self.breaks >= 0
            elif isinstance(error, RequestCancelledError):
                assert flight.cancelled
            else:
                self.scratch.check(flight.request, flight.job.result())

    def teardown(self) -> None:
        try:
            self.gate.open()
            for flight in self.flights:
                flight.job.exception(timeout=60) if not flight.job.done() else None
            self.answers_are_those_from_scratch()
        finally:
            self.gate.open()
            self.runtime.close()


def run_machine(
    package: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    max_examples: int,
    stateful_step_count: int = 40,
) -> None:
    # Small, so that buffers grow and shrink.
    monkeypatch.setattr(kv_cache, "LEAST_LENGTH", 16)
    monkeypatch.setattr(decoder_graph, "KEPT_LENGTH", 32)
    for module in (lane, prefixes):
        monkeypatch.setattr(module, "BLOCK", 4)  # so that texts share blocks
    monkeypatch.setattr(decoding, "WORDS_AT_ONCE", 2)  # so that label words take several chunks
    monkeypatch.setattr(scheduler, "LOOK_EVERY", 0.0)  # no event depends on the clock
    if kind == "growing":
        package = growing_package(package, tmp_path)
    scratch = Scratch(package)
    if kind == "drafts":
        monkeypatch.setattr(PromptLookup, "draft", scratch.foretell())
    run_state_machine_as_test(
        lambda: Machine(package, scratch, kind),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=stateful_step_count,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # a threaded machine shrinks for minutes
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_events(
    kind: str, tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_machine(tiny_llama_package, kind, monkeypatch, tmp_path, max_examples=12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_events_at_length(
    kind: str, tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_machine(tiny_llama_package, kind, monkeypatch, tmp_path, max_examples=600, stateful_step_count=80)


def test_a_slot_that_moved_keeps_its_prefix(tiny_llama_package: Path) -> None:
    """Three sequences; the middle one leaves, the one moved there leaves, and the next one uses the same prompt."""
    scratch = Scratch(tiny_llama_package)
    options = replace(QUIET, max_batch=4, batch_invariant=True)
    with edgeprompt.load(tiny_llama_package, options=options) as runtime:
        for prompt in prompts_of(runtime.manifest).values():
            runtime.add_prompt(prompt)
        gate = Gate(runtime._engine._lanes[0].graph)  # type: ignore[attr-defined]
        plan = [(None, 30), (None, 4), ("more", 6), ("more", 3)]
        requests = [
            Request("a", prompt, task="generate", options=GenerationOptions(max_new_tokens=count, logprobs=True))
            for prompt, count in plan
        ]
        jobs = [runtime.submit(request) for request in requests[:3]]
        for _ in range(60):
            gate.settle(lambda: False)
            if jobs[2].done() and len(jobs) == 3:
                for _ in range(4):  # the step that fills up the lone sequence
                    gate.let_through()
                    gate.settle(lambda: False)
                jobs.append(runtime.submit(requests[3]))
            if len(jobs) == 4 and jobs[3].done():
                break
            gate.let_through()
        gate.open()
        for request, job in zip(requests, jobs, strict=True):
            scratch.check(request, job.result(60))
