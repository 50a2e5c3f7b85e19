"""What requests make of logits, the same for every architecture that has it: aggregation, NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EdgePromptError, Runtime
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

WORDS = {"bad": (" bad", " not so good"), "good": (" good", " not so bad", " very good")}
ARCHITECTURES = ("decoder", "encoder", "encoder-decoder")


@pytest.fixture(scope="module")
def runtimes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened: dict[str, Runtime] = {}

    def get(architecture: str) -> Runtime:
        if architecture not in opened:
            if architecture == "decoder":
                package = request.getfixturevalue("tiny_llama_package")
            elif architecture == "encoder":
                package = request.getfixturevalue("encoder_package")("BERT")
            else:
                package = request.getfixturevalue("seq2seq_package")("T5")
            opened[architecture] = edgeprompt.load(package, options=QUIET)
        return opened[architecture]

    yield get
    for runtime in opened.values():
        runtime.close()


def add(runtime: Runtime, architecture: str, name: str, words: dict[str, tuple[str, ...]], **fields: Any) -> None:
    text = "{prompt}{text}{mask}" if architecture == "encoder" else "{prompt}{text}"
    prompt = make_prompt(runtime.manifest, name, verbalizer=words, template=Template.parse(text), **fields)
    runtime.add_prompt(prompt)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aggregation_of_label_words(architecture: str, runtimes: Callable[[str], Runtime]) -> None:
    runtime = runtimes(architecture)
    words = {"bad": ("a", "b"), "good": ("c", "d", "e")} if architecture == "encoder" else WORDS
    each = [word for group in words.values() for word in group]
    add(runtime, architecture, "each", {word: (word,) for word in each})
    alone = runtime.classify("the film", prompt="each").logits
    calibration = (0.4, -0.3)
    for aggregation, join in (("sum", np.logaddexp.reduce), ("mean", np.mean), ("max", np.max)):
        add(runtime, architecture, "joined", words, verbalizer_aggregation=aggregation, calibration=calibration)
        found = runtime.classify("the film", prompt="joined")
        expected = np.array([join([alone[word] for word in group]) for group in words.values()])
        assert list(found.logits.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        chances = np.exp(expected - np.asarray(calibration))
        assert list(found.scores.values()) == pytest.approx((chances / chances.sum()).tolist(), abs=1e-5)


def break_logits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, bad: float, *, after: int = 0) -> None:
    """From step `after` on every run of the real graph gives logits that are not finite."""
    engine: Any = runtime._engine
    if hasattr(engine, "_lanes") and hasattr(engine, "_prefixes"):
        owner, methods = engine._lanes[0].graph, ("prefill", "decode")
    else:
        owner, methods = engine._graphs, ("step",)
    count = 0

    def replace(method: str) -> None:
        real = getattr(owner, method)

        def broken(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            logits = real(*arguments)
            return np.full_like(logits, bad) if count > after else logits

        monkeypatch.setattr(owner, method, broken)

    for method in methods:
        replace(method)


ASKS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "penalised": {"repetition_penalty": 1.3},
    "choices": {"choices": (" good film", " good story", " bad")},
    "logprobs": {"logprobs": True},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_no_strategy_answers_by_logits_that_are_not_finite(
    architecture: str, ask: str, after: int, bad: float, runtimes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (ask == "beams" and architecture == "decoder") or (ask == "choices" and after):
        pytest.skip("decoders have no beams, and a choice may be over before")
    runtime = runtimes(architecture)
    break_logits(runtime, monkeypatch, bad, after=after)
    with pytest.raises(EdgePromptError, match="NaN or infinite"):
        runtime.generate("the film", max_new_tokens=20, **ASKS[ask])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_scores_and_logits_are_finite_or_an_error(
    architecture: str, bad: float, runtimes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtimes(architecture)
    add(runtime, architecture, "words", WORDS)
    break_logits(runtime, monkeypatch, bad)
    with pytest.raises(EdgePromptError, match="NaN or infinite"):
        runtime.classify("the film", prompt="words")
    with pytest.raises(EdgePromptError, match="NaN or infinite"):
        runtime.logits("the film")
