"""The encoder's output of a text is kept for all requests that need the same one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt import GenerationOptions, Request, Runtime
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

TEXT = "the film was never boring"
WORDS = {"negative": (" bad", " not so good"), "positive": (" good", " not so bad")}
DECODER = ("one", "two", "said")
"""Prompts that leave the encoder's text as it is."""


def opened(package: Path, **options: Any) -> Runtime:
    runtime = edgeprompt.load(package, options=dataclasses.replace(QUIET, **options))
    template = Template.parse("{text}")
    for seed, name in enumerate(("one", "two")):
        runtime.add_prompt(
            make_prompt(runtime.manifest, name, "prefix-tuning", seed=seed, verbalizer=WORDS, template=template)
        )
    said = make_prompt(
        runtime.manifest, "said", verbalizer=WORDS, template=template, generation={"decoder_prefix": " so"}
    )
    runtime.add_prompt(dataclasses.replace(said, prompt_embeddings=None))
    runtime.add_prompt(
        make_prompt(runtime.manifest, "rows", verbalizer=WORDS, template=Template.parse("{prompt}{text}"))
    )
    return runtime


@pytest.fixture(params=["T5", "BART", "T5 int8"])
def package(request: pytest.FixtureRequest, seq2seq_package: Callable[..., Path]) -> Path:
    family, _, precision = request.param.partition(" ")
    return seq2seq_package(family, precision) if precision else seq2seq_package(family)


def encoded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of texts of every run of the encoder."""
    graphs: Any = runtime._engine._graphs  # type: ignore[attr-defined]
    real, counts = graphs.encode, list[int]()
    monkeypatch.setattr(graphs, "encode", lambda rows: (counts.append(len(rows)), real(rows))[1])
    return counts


def close(found: Any, expected: Any) -> bool:
    return all(
        dict(one.scores) == pytest.approx(dict(other.scores), abs=1e-6)
        for one, other in zip(found, expected, strict=True)
    )


def test_tasks_over_one_text_encode_it_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(package, prefix_budget=0) as runtime:
        expected = [runtime.classify(TEXT, prompt=name) for name in (*DECODER, "rows")]
    with opened(package) as runtime:
        counts = encoded(runtime, monkeypatch)
        found: Any = list(runtime.run_tasks(TEXT, DECODER).values())
        assert sum(counts) == 1
        found.append(runtime.classify(TEXT, prompt="rows"))  # with virtual tokens among the text it is another
        assert sum(counts) == 2
        assert close(found, expected)
        again = runtime.classify(TEXT, prompt="two")
        assert sum(counts) == 2
        assert close([again], [expected[1]])
        assert (again.timings.reused_tokens, again.timings.computed_tokens) == (again.timings.input_tokens, 0)
        batch = [Request(text, prompt) for text in (TEXT, "a", "a story of a film") for prompt in (*DECODER, "rows")]
        alone = [runtime.run([request])[0] for request in batch]
        assert close(runtime.run(batch), alone)
    with opened(package, max_batch=16) as runtime:
        assert close(runtime.run(batch), alone)


def test_nothing_is_kept_of_a_prompt_that_goes_or_beyond_the_budget(package: Path) -> None:
    with opened(package) as runtime:
        runtime.classify([TEXT, "a"], prompt="rows")
        runtime.classify([TEXT, "a"], prompt="one")
        blocks = runtime._engine.derived._blocks
        assert len(blocks) == 4
        runtime.remove_prompt("rows")
        assert len(blocks) == 2
        size = sum(block.nbytes for block, _ in blocks.values())
    with opened(package, prefix_budget=size) as runtime:
        for text in (TEXT, "a", "b", "c d e", TEXT):
            runtime.generate(text, max_new_tokens=3)
            assert runtime._engine.derived.size <= size


def test_embeddings_and_beams_beside_kept_encodings(package: Path) -> None:
    beams = Request(TEXT, options=GenerationOptions(num_beams=3, max_new_tokens=6))
    with opened(package, prefix_budget=0) as runtime:
        expected = runtime.run([beams])[0].token_ids, runtime.embed([TEXT])[0]
    with opened(package) as runtime:
        for _ in range(2):
            found = runtime.run([beams, Request(TEXT, task="embed"), beams])
            assert found[0].token_ids == found[2].token_ids == expected[0]
            assert found[1] == pytest.approx(expected[1], abs=1e-5)
