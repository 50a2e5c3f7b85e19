"""Many labels of several tokens each: the text is computed once, the words behind it in chunks, in bounded memory."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import CapacityError, Request, RequestCancelledError, RequestTimeoutError, Runtime
from edgeprompt.decoding.strategies import WORDS_AT_ONCE, ScoreWords
from edgeprompt.engines.seq2seq.graphs import SourceRow
from edgeprompt.prompts.template import Template
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.request import Clock, GenerationOptions
from tests.engines.decoder.test_scheduler_states import Scratch
from tests.support.packages import growing_package
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

ACTIONS = (" good", " very good", " find the", " never", " cancel", " make a long", " bad")
THINGS = (
    " story",
    " film",
    " card",
    " actor of a film",
    "",
    " man who went home",
    " one",
    " thing",
    " end",
    " x",
    " y",
)
WORDS = {a + b: (a + b,) for a, b in itertools.product(ACTIONS, THINGS)}
"""77, some of one token, some the beginning of others."""
TEXT = "the film was never boring"
KINDS = ("in place", "batch invariant", "growing", "T5", "BART")


@pytest.fixture(scope="module")
def package_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def package(kind: str) -> Path:
        if kind in ("T5", "BART"):
            return Path(request.getfixturevalue("seq2seq_package")(kind))
        found: Path = request.getfixturevalue("tiny_llama_package")
        return growing_package(found, tmp_path_factory.mktemp("labels")) if kind == "growing" else found

    return package


def opened(package: Path, kind: str, words: Any = None, **options: Any) -> Runtime:
    runtime = edgeprompt.load(package, options=replace(QUIET, batch_invariant=kind == "batch invariant", **options))
    template = Template.parse("{prompt}{text}" if kind in ("T5", "BART") else "{prompt}{text}\nA:")
    runtime.add_prompt(make_prompt(runtime.manifest, "rows", verbalizer=words or WORDS, count=5, template=template))
    return runtime


@pytest.fixture(scope="module", params=KINDS)
def kind_and_runtime(request: pytest.FixtureRequest, package_of: Callable[[str], Path]) -> Iterator[tuple[str, Any]]:
    with opened(package_of(request.param), request.param) as runtime:
        yield request.param, runtime


def verbalizer_of(runtime: Runtime) -> Verbalizer:
    found = runtime._prompts.find("rows").verbalizer
    assert found is not None
    return found


def from_scratch(runtime: Runtime, package: Path, kind: str, words: Verbalizer) -> dict[str, float]:
    """Scores of all labels; each word's every token is computed anew, from the prompt and the text on, alone."""
    if kind in ("T5", "BART"):
        engine: Any = runtime._engine
        prompt = runtime.prompt("rows")
        ids = runtime._package.tokenizer.encode(TEXT)
        source = SourceRow(np.array([*range(512, 517), *ids]), prompt.prompt_embeddings)

        def logprobs(said: tuple[int, ...]) -> Any:
            state = engine._graphs.begin(engine._graphs.encode([source]), [None])
            for token in [engine._start, *said]:
                logits = engine._graphs.step(state, [token])[0].astype(np.float64)
            return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    else:
        scratch = Scratch(package)
        ids = scratch.text_ids("rows", TEXT, "classify")

        def logprobs(said: tuple[int, ...]) -> Any:
            return scratch.logprobs("rows", (*ids, *said))

    known = cache(logprobs)
    each = [sum(known(word[:place])[token] for place, token in enumerate(word)) for word in words.words]
    return dict(zip(words.labels, words.scores(each).tolist(), strict=True))


def close(found: Any, expected: dict[str, float]) -> bool:
    """Probabilities within 1e-6."""
    chances = np.exp(np.array(list(expected.values())))
    same = np.allclose(list(found.scores.values()), chances / chances.sum(), atol=1e-6, rtol=0)
    return same and dict(found.logits) == pytest.approx(expected, abs=1e-4)


def test_scores_are_those_from_scratch(
    kind_and_runtime: tuple[str, Runtime], package_of: Callable[[str], Path]
) -> None:
    kind, runtime = kind_and_runtime
    words = verbalizer_of(runtime)
    assert sum(len(word) > 1 for word in words.words) > 2 * WORDS_AT_ONCE  # so there are three chunks
    expected = from_scratch(runtime, package_of(kind), kind, words)
    assert close(runtime.classify(TEXT, prompt="rows"), expected)
    assert close(runtime.classify([TEXT, "a", TEXT], prompt="rows")[2], expected)


def test_others_run_beside(kind_and_runtime: tuple[str, Runtime]) -> None:
    _, runtime = kind_and_runtime
    settings = GenerationOptions(max_new_tokens=30, temperature=2.0, seed=1)
    generate, classify = Request("the film", task="generate", options=settings), Request(TEXT, "rows", task="classify")
    batch = [generate, classify, generate, classify, Request("a", "rows", task="classify"), generate]
    alone = {request: runtime.run([request])[0] for request in {*batch}}
    for request, found in zip(batch, runtime.run(batch), strict=True):
        if request.task == "generate":
            assert found.token_ids == alone[request].token_ids
        else:
            assert dict(found.scores) == pytest.approx(dict(alone[request].scores), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_budget_makes_chunks_smaller_and_no_difference(kind: str, package_of: Callable[[str], Path]) -> None:
    with opened(package_of(kind), kind) as runtime:
        expected = runtime.classify(TEXT, prompt="rows")
    size = runtime.manifest.geometry
    position = 2 * size.num_layers * size.num_key_value_heads * size.head_size * 4
    # In place, 256 positions are the least that a sequence has; the others count what it needs.
    positions = {"in place": 256, "batch invariant": 256, "growing": 40}.get(kind, 2 * 40)
    budget = 3 * position * positions
    with opened(package_of(kind), kind, kv_budget=budget) as runtime:
        engine: Any = runtime._engine
        owner, name = (engine._graphs, "step") if kind in ("T5", "BART") else (engine._lanes[0].graph, "decode")
        real, sizes = getattr(owner, name), []

        def step(*arguments: Any) -> Any:
            sizes.append(len(arguments[1]))
            cache = getattr(owner, "_cache", None)
            assert cache is None or cache._buffer.nbytes <= budget
            return real(*arguments)

        setattr(owner, name, step)
        for found in runtime.classify([TEXT] * 3, prompt="rows"):
            assert dict(found.scores) == pytest.approx(dict(expected.scores), abs=1e-6)
        assert max(sizes) <= 4
    with (
        pytest.raises(CapacityError, match=r"kv_budget|KV budget"),
        opened(package_of(kind), kind, kv_budget=position) as runtime,
    ):
        runtime.classify(TEXT, prompt="rows")


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_with_many_labels_are_cancelled_and_late(
    kind: str, package_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(package_of(kind), kind, max_queue=2) as runtime:
        engine: Any = runtime._engine
        expected = runtime.classify(TEXT, prompt="rows")
        owner, name = (engine._graphs, "step") if kind in ("T5", "BART") else (engine._lanes[0].graph, "decode")
        real, begun, go, steps = getattr(owner, name), threading.Event(), threading.Event(), []

        def step(*arguments: Any) -> Any:
            steps.append(len(arguments[1]))
            if len(steps) == 3:  # in the middle of a chunk
                begun.set()
                go.wait(20)
            return real(*arguments)

        monkeypatch.setattr(owner, name, step)
        request = Request(TEXT, "rows", task="classify")
        job = runtime.submit(request)
        assert begun.wait(20)
        # The queue takes two, and the scheduler looks at deadlines between steps: `run` waits until this one goes on.
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(runtime.run, [replace(request, timeout=0.05), request, request])
            until(lambda: engine.scheduler._waiting)
            assert job.cancel()
            time.sleep(0.06)
            go.set()
            with pytest.raises(RequestTimeoutError):
                waiting.result(20)
        with pytest.raises(RequestCancelledError):
            job.result(20)
        steps.clear()
        begun.clear()
        go.clear()
        late = runtime.submit(replace(request, timeout=0.05))
        until(lambda: begun.is_set() or late.done())
        time.sleep(0.06)
        go.set()
        with pytest.raises(RequestTimeoutError):
            late.result(20)
        assert len(steps) <= 4
        assert dict(runtime.classify(TEXT, prompt="rows").scores) == pytest.approx(dict(expected.scores), abs=1e-6)
        lane = engine._lanes[0]
        assert not lane.running
        assert getattr(engine, "_budget", None) is None or engine._budget.held == 0
        assert not getattr(owner, "_stems", None)


@pytest.mark.parametrize("kind", ["in place", "growing", "T5"])
def test_a_thousand_labels_take_the_memory_of_a_chunk(kind: str, package_of: Callable[[str], Path]) -> None:
    letters = np.random.default_rng(0).choice([*"abcdefghij"], (1000, 5)).tolist()
    words = {word: (" " + " ".join(word),) for word in map("".join, letters)}
    with opened(package_of(kind), kind, words) as runtime:
        found = runtime.classify(TEXT, prompt="rows")
        assert len(found.scores) == len(words) > 900
        assert sum(found.scores.values()) == pytest.approx(1)
        graph = getattr(runtime._engine._lanes[0], "graph", None)  # type: ignore[attr-defined]
        if kind == "in place":
            size = runtime.manifest.geometry
            position = 2 * size.num_layers * size.num_key_value_heads * size.head_size * 4
            assert graph._cache._buffer.nbytes <= 64 * 256 * position
        elif kind == "growing":
            assert len(graph._rows) <= 1


def test_moves_of_the_strategy() -> None:
    """Chunks in the order of tokens, a sequence for each beginning, back to the text between chunks."""
    words = ((1, 2), (1, 3, 4), (5,), (6, 7), (1, 3), (2, 1), (0, 2, 2, 2))
    labels = tuple("abcdefg")
    strategy = ScoreWords(Verbalizer(labels, words, tuple(range(7))), Clock())
    assert (strategy.width, strategy.begins_again) == (4, False)
    strategy.width = 2
    assert (strategy.width, strategy.begins_again) == (2, True)
    logits = np.log(np.arange(1, 9, dtype=np.float32))[None]
    assert strategy.advance(logits) == ([0, 1], None)  # 0 2 2 2, and all that begin with 1
    assert strategy.advance(np.repeat(logits, 2, 0)) == ([2, 3], [0, 1])
    assert strategy.advance(np.repeat(logits, 2, 0)) == ([2], [0])
    assert strategy.advance(logits) == ([2, 6], None)
    assert strategy.advance(np.repeat(logits, 2, 0)) is None
    chance = np.log(np.arange(1, 9) / 36)
    expected = [sum(chance[token] for token in word) for word in words]
    assert list(strategy.result().logits.values()) == pytest.approx(expected, abs=1e-6)
