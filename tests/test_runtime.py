"""Answers of a runtime, and requests that it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EdgePromptError, InputError, PromptNotFoundError, Request, Runtime
from edgeprompt.request import GenerationOptions
from tests.support.runtimes import QUIET, WORDS


def test_one_text_or_a_list(runtime: Runtime) -> None:
    one = runtime.classify("the film", prompt="words")
    assert one.label in WORDS
    assert sum(one.scores.values()) == pytest.approx(1)
    assert one.timings.ttft > 0
    two = runtime.classify(["the film", {"text": "the story"}], prompt="words")
    assert dict(two[0].logits) == dict(one.logits)
    assert len(two) == 2
    assert runtime.classify([], prompt="words") == []
    assert runtime.provider == "cpu"


def test_one_text_many_tasks(runtime: Runtime) -> None:
    found = runtime.run_tasks("the film", ["words", "story"])
    assert found["words"].label == runtime.classify("the film", prompt="words").label
    assert found["story"].token_ids == runtime.generate("the film", prompt="story").token_ids


def test_stop_ends_before_the_stop_string(runtime: Runtime) -> None:
    settings = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}
    text = runtime.generate("the film", prompt="story", **settings).text
    stop = text[len(text) // 2 :][:3]
    found = runtime.generate("the film", prompt="story", stop=stop, **settings)
    assert found.text == text[: text.find(stop)]
    assert found.finish_reason == "stop"
    assert "".join(runtime.stream("the film", prompt="story", stop=stop, **settings)) == found.text


def test_choices_are_the_only_answers(runtime: Runtime) -> None:
    choices = (" good", " good story", " bad actors")
    greedy = runtime.generate("the film", prompt="story", choices=choices)
    assert greedy.text in choices
    assert greedy.finish_reason == "stop"
    drawn = runtime.run(
        [
            Request("the film", "story", options=GenerationOptions(choices=choices, temperature=5.0, seed=seed))
            for seed in range(40)
        ]
    )
    assert {result.text for result in drawn} == set(choices)


def test_a_choice_longer_than_the_reserved_room_is_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match=r"longest of the choices has \d+ tokens, and max_new_tokens is 64"):
        runtime.generate("the film", prompt="story", choices=(" good" * 200, " bad"))
    choices = (" good" * 100, " good" * 99)
    assert runtime.generate("the film", prompt="story", choices=choices, max_new_tokens=200).text in choices


def test_same_seed_same_text_in_any_company(runtime: Runtime) -> None:
    request = Request("the film", "story", options=GenerationOptions(max_new_tokens=20, temperature=1.0, seed=5))
    others = [Request("a long story", options=GenerationOptions(max_new_tokens=9, temperature=1.0)) for _ in range(5)]
    alone = runtime.run([request])[0]
    assert runtime.run([*others, request, *others])[5].token_ids == alone.token_ids
    seeds = {runtime.generate("the film", max_new_tokens=20, temperature=1.0).token_ids for _ in range(5)}
    assert len(seeds) > 1  # without a seed every run differs


def test_a_row_in_error_among_good_ones(runtime: Runtime) -> None:
    requests = [
        Request("the film", "words"),
        Request(prompt="words", input_ids=[9999]),
        Request("x"),
    ]
    found = runtime.run(requests, return_errors=True)
    assert isinstance(found[1], InputError)
    assert found[0].label in WORDS
    with pytest.raises(InputError, match="9999"):
        runtime.run(requests)


def test_an_unknown_prompt_fails_its_row_alone(runtime: Runtime) -> None:
    found = runtime.run([Request("a", "nobody"), Request("a", "words")], return_errors=True)
    assert isinstance(found[0], PromptNotFoundError)
    assert found[1].label in WORDS


def test_what_is_no_text_is_named(runtime: Runtime) -> None:
    for text, match in ((5, "the text is int"), ({"text": 5}, "text of 'text' is int"), ("a\ud800b", "surrogate")):
        with pytest.raises(InputError, match=match):
            runtime.generate(text, max_new_tokens=1)
    for timeout in ("soon", -1, float("nan")):
        with pytest.raises(InputError, match="timeout is"):
            runtime.generate("a", timeout=timeout)
    for wrong, match in (
        ({"options": None}, "options is NoneType"),
        ({"prompt": ["words"]}, "prompt is"),
        ({"input_ids": [1.5]}, "input_ids must be integers"),
        ({"input_ids": "12"}, "input_ids must be integers"),
        ({"input_ids": 5}, "input_ids must be integers"),
    ):
        with pytest.raises(InputError, match=match):
            Request("a", **wrong)
    assert runtime.generate(input_ids=np.array([5, 6]), max_new_tokens=1).timings.input_tokens == 2


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_prompt_that_makes_the_logits_nan_has_no_answer(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = runtime._engine._lanes[0].graph
    real = graph.prefill
    monkeypatch.setattr(graph, "prefill", lambda *arguments: real(*arguments) * np.float32("nan"))
    for ask in (lambda: runtime.classify("a", prompt="words"), lambda: runtime.generate("a", prompt="story")):
        with pytest.raises(EdgePromptError, match="logits are NaN"):
            ask()


def test_wrong_options_are_named(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="unknown option 'max_tokens'; known: max_new_tokens"):
        runtime.generate("a", max_tokens=3)
    with pytest.raises(InputError, match="not both"):
        runtime.generate("a", options=GenerationOptions(), top_k=3)
    with pytest.raises(InputError, match="needs 'text'"):
        runtime.classify({"question": "a"}, prompt="words")
    with pytest.raises(InputError, match="list of texts"):
        runtime.embed("a")


def test_a_package_that_moves_away_keeps_running(tiny_llama_package: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_package, tmp_path / "package")
    with edgeprompt.load(tmp_path / "package", options=QUIET) as runtime:
        before = runtime.generate("the film", max_new_tokens=5).token_ids
        shutil.rmtree(tmp_path / "package")
        assert runtime.generate("the film", max_new_tokens=5).token_ids == before
