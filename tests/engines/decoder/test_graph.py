from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions, Request, Runtime
from edgeprompt.engines.decoder import engine
from edgeprompt.engines.decoder.graph import DecoderGraph, GrowingGraph, SharedGraph, open_graph
from edgeprompt.ort.session import Session
from edgeprompt.request import GenerationOptions
from tests.support.packages import growing_package
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

WORDS = {"x": (" good", " good story", " very good actors"), "y": (" bad", " never ever made")}


def graph_of(runtime: Runtime) -> object:
    return runtime._engine._lanes[0].graph


def add_prompts(runtime: Runtime) -> None:
    runtime.add_prompt(make_prompt(runtime.manifest, "rows", verbalizer=WORDS))
    runtime.add_prompt(make_prompt(runtime.manifest, "deep", "prefix-tuning", seed=1))


def requests() -> list[Request]:
    options = GenerationOptions(max_new_tokens=15, logprobs=True)
    generate = [
        Request("the film " * n, prompt, task="generate", options=options)
        for n in (1, 4, 9)
        for prompt in (None, "rows", "deep")
    ]
    return [*generate, Request("a story", "rows"), Request("it was a long film", "rows")]


def test_a_graph_that_grows_its_cache_answers_the_same(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as shared:
        assert isinstance(graph_of(shared), SharedGraph)
        add_prompts(shared)
        expected = shared.run(requests())
    # Without shared buffers GroupQueryAttention returns past and new keys joined, as other exporters' graphs do.
    with edgeprompt.load(growing_package(tiny_llama_package, tmp_path), options=QUIET) as growing:
        assert isinstance(graph_of(growing), GrowingGraph)
        add_prompts(growing)
        found = growing.run(requests())
    for one, other in zip(expected[:9], found[:9], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    for one, other in zip(expected[9:], found[9:], strict=True):
        assert dict(one.logits) == pytest.approx(dict(other.logits), abs=1e-3)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every run of a growing graph has."""
    real, seen = GrowingGraph._run, list[int]()

    def counted(self: GrowingGraph, rows: Sequence[int], ids: Any, *rest: Any) -> Any:
        seen.append(len(rows) if ids.shape[1] == 1 else 0)
        return real(self, rows, ids, *rest)

    monkeypatch.setattr(GrowingGraph, "_run", counted)
    return seen


def test_rows_of_one_length_decode_together_on_others_graphs(
    tiny_llama_package: Path, tmp_path: Path, runs: list[int]
) -> None:
    """Where an answer ends early, the others go on together."""
    asked = [
        Request(input_ids=ids, task="generate", options=GenerationOptions(max_new_tokens=count, logprobs=True))
        for ids, count in (((5, 6, 7), 4), ((9, 8, 7), 9), ((11, 12, 13), 9), ((3, 4, 5, 6, 7), 5))
    ]
    with edgeprompt.load(growing_package(tiny_llama_package, tmp_path), options=QUIET) as growing:
        alone = [growing.run([request])[0] for request in asked]
        runs.clear()
        together = growing.run(asked)
    assert [found.token_ids for found in together] == [found.token_ids for found in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert max(runs) >= 2
    assert sum(runs) == sum(len(found.token_ids) - 1 for found in alone)


def test_rows_of_any_length_decode_together_where_attention_counts_positions(
    tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    """On another device GroupQueryAttention grows its caches; here it does so on the CPU."""
    with edgeprompt.load(tiny_llama_package, options=QUIET) as shared:
        add_prompts(shared)
        expected = shared.run(requests())

    def elsewhere(session: Session, *rest: Any, **more: Any) -> DecoderGraph:
        grown = open_graph(dataclasses.replace(session, device="elsewhere"), *rest, **more)
        assert isinstance(grown, GrowingGraph)
        grown._device = "cpu"
        return grown

    monkeypatch.setattr(engine, "open_graph", elsewhere)
    with edgeprompt.load(tiny_llama_package, options=QUIET) as growing:
        add_prompts(growing)
        runs.clear()
        found = growing.run(requests())
        steps = sum(len(result.token_ids) - 1 for result in found[:9])
        assert max(runs) > 4
        assert len([rows for rows in runs if rows]) < steps / 2
    for one, other in zip(expected[:9], found[:9], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    for one, other in zip(expected[9:], found[9:], strict=True):
        assert dict(one.logits) == pytest.approx(dict(other.logits), abs=1e-3)


@pytest.mark.parametrize("length", [40, 250])
def test_garbage_in_the_buffer_never_shows(tiny_llama_package: Path, length: int) -> None:
    """What other rows left in a slot, here NaN, takes no part."""
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        ids = [int(token) for token in np.random.default_rng(0).integers(3, 500, length - 5)]
        first = runtime.generate(input_ids=ids, max_new_tokens=5)
        graph_of(runtime)._cache._buffer[:] = np.nan
        graph_of(runtime)._cache._held.clear()  # what it held is gone
        assert runtime.generate(input_ids=ids, max_new_tokens=5).token_ids == first.token_ids


def test_batch_invariant_rows_are_bitwise_the_same(tiny_llama_package: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=replace(QUIET, batch_invariant=True)) as runtime:
        add_prompts(runtime)
        alone = [runtime.run([request])[0] for request in requests()]
        together = runtime.run(requests())
    for one, other in zip(alone[:9], together[:9], strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    for one, other in zip(alone[9:], together[9:], strict=True):
        assert dict(one.logits) == dict(other.logits)


def test_batch_invariant_at_int4(smollm2_package: Path) -> None:
    """One row and several take different kernels, which int8 activations make visible; unless rows run in pairs."""
    options = GenerationOptions(max_new_tokens=10)
    texts = ["The film was", "A slow start, and then", "I never liked", "The best of"]
    with edgeprompt.load(smollm2_package, provider="cpu", options=EngineOptions(batch_invariant=True)) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "p", count=8))
        batch = [Request(text, prompt, task="generate", options=options) for text in texts for prompt in (None, "p")]
        alone = [runtime.run([request])[0].token_ids for request in batch]
        assert [result.token_ids for result in runtime.run(batch)] == alone
