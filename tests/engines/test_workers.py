"""Requests side by side, each on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeprompt import EngineOptions, GenerationOptions, Request, Runtime, load
from edgeprompt.bench.workload import synthetic_prompt
from edgeprompt.errors import InputError, RequestCancelledError
from edgeprompt.package.folder import open_package

TEXTS = [f"the film number {number} is {word}" for number in range(6) for word in ("great", "terrible", "a story")]


def opened(package: Path, **options: int) -> Runtime:
    runtime = load(package, options=EngineOptions(provider="cpu", **options))
    runtime.add_prompt(synthetic_prompt(open_package(package), name="tone", seed=3))
    return runtime


def test_answers_are_those_of_one_worker(tiny_llama_package: Path) -> None:
    with opened(tiny_llama_package, threads=1) as one, opened(tiny_llama_package, workers=3) as three:
        want, found = one.classify(TEXTS, prompt="tone"), three.classify(TEXTS, prompt="tone")
        assert [answer.logits for answer in found] == [answer.logits for answer in want]
        tokens = [
            [answer.token_ids for answer in runtime.generate(TEXTS[:5], prompt="tone", max_new_tokens=5)]
            for runtime in (one, three)
        ]
        assert tokens[0] == tokens[1]


def test_workers_run_at_the_same_time(tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tiny_llama_package, workers=2) as runtime:
        meeting = threading.Barrier(2, timeout=30)  # breaks, and fails both requests, if one waits for the other
        for lane in runtime._engine._lanes:
            real = lane.graph.prefill
            monkeypatch.setattr(lane.graph, "prefill", lambda *given, real=real: (meeting.wait(), real(*given))[1])
        assert len(runtime.classify(TEXTS[:2], prompt="tone")) == 2


def test_closing_ends_every_worker(tiny_llama_package: Path) -> None:
    before = set(threading.enumerate())
    runtime = opened(tiny_llama_package, workers=2)
    options = GenerationOptions(max_new_tokens=40)
    jobs = [runtime.submit(Request(text, prompt="tone", task="generate", options=options)) for text in TEXTS[:12]]
    runtime.close()
    errors = [job.exception(timeout=30) for job in jobs]
    assert all(error is None or isinstance(error, RequestCancelledError) for error in errors)
    assert not any(thread.name == "edgeprompt-scheduler" for thread in set(threading.enumerate()) - before)


def test_encoders(encoder_package: Callable[..., Path]) -> None:
    package = encoder_package("BERT")
    texts = [" ".join([text] * (1 + index % 3)) for index, text in enumerate(TEXTS)]  # too unlike for one batch
    with (
        load(package, options=EngineOptions(provider="cpu", threads=1)) as one,
        load(package, options=EngineOptions(provider="cpu", workers=2)) as two,
    ):
        assert np.array_equal(one.embed(texts), two.embed(texts))
        with pytest.raises(InputError, match="at least one character"):
            two.embed([*texts, ""])


def test_encoder_decoders(seq2seq_package: Callable[..., Path]) -> None:
    package = seq2seq_package("T5")
    options = (
        EngineOptions(provider="cpu", threads=1, max_batch=2),
        EngineOptions(provider="cpu", workers=2, max_batch=2),
    )
    with load(package, options=options[0]) as one, load(package, options=options[1]) as two:
        found = [[answer.token_ids for answer in runtime.generate(TEXTS, max_new_tokens=4)] for runtime in (one, two)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [({"workers": 0}, "workers is 0"), ({"workers": 2, "threads": 2}, "give one, a worker has one thread")],
)
def test_workers_that_cannot_be(options: dict[str, int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        EngineOptions(**options)


def test_lanes_is_the_old_name() -> None:
    assert EngineOptions(lanes=3).workers == 3
    with pytest.raises(InputError, match="give workers alone"):
        EngineOptions(workers=2, lanes=3)
