"""Answers with drafts are the answers without."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions, Generation, Request, Runtime
from edgeprompt.decoding.drafts import MOST, PromptLookup
from edgeprompt.errors import InputError, RequestCancelledError, UnsupportedError
from edgeprompt.package.folder import open_package
from edgeprompt.request import GenerationOptions
from tests.support.decoder_models import CONFIGS, loaded_decoder
from tests.support.packages import growing_package
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

DRAFTS = replace(QUIET, drafts=True)
TEXTS = (
    "the film was good the film was bad the film was very long and the story was never made",
    "a story of a man who was good, a story of a man who never went home",
    "One two three. One two three. ONE TWO THREE, one two three!",
    "x = (a + b) * (a + b) * (a + b)",
    "a",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": True, "top_logprobs": 3},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.2, "seed": 4, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"stop": ("e",)},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
)


@pytest.fixture(scope="module")
def runtime(tiny_llama_package: Path) -> Iterator[Runtime]:
    with edgeprompt.load(tiny_llama_package, options=DRAFTS) as loaded:
        loaded.add_prompt(make_prompt(loaded.manifest, "rows", count=5))
        loaded.add_prompt(make_prompt(loaded.manifest, "deep", "prefix-tuning", count=6))
        yield loaded


def said(result: Any) -> Any:
    """All of an answer but its times."""
    return dataclasses.replace(result, timings=None)


def no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps stay as they are, of several positions, and nothing is drafted."""
    monkeypatch.setattr(PromptLookup, "draft", lambda *_: ([], 0.0))


def ask(runtime: Runtime, text: str, **settings: Any) -> Generation:
    return runtime.generate(text, **{"max_new_tokens": 40, **settings})


def foretell(monkeypatch: pytest.MonkeyPatch, answer: Sequence[int]) -> None:
    """Drafts are what the answer will be, with wrong tokens among them: random weights seldom copy a text."""
    rng = random.Random(len(answer))

    def draft(lookup: PromptLookup, said: Sequence[int], most: int = MOST) -> tuple[list[int], float]:
        ahead = list(answer[len(said) : len(said) + rng.randint(0, most)])
        return [token if rng.random() < 0.8 else 7 for token in ahead] or [7], 0.8

    monkeypatch.setattr(PromptLookup, "draft", draft)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prompt", [None, "rows", "deep"])
def test_the_same_to_the_last_bit_as_without_drafts(
    runtime: Runtime, prompt: str | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = 0
    for text in TEXTS:
        found = ask(runtime, text, prompt=prompt, **settings)
        with monkeypatch.context() as patch:
            no_drafts(patch)
            expected = ask(runtime, text, prompt=prompt, **settings)
        with monkeypatch.context() as patch:
            foretell(patch, expected.token_ids)
            foretold = ask(runtime, text, prompt=prompt, **settings)
        assert said(found) == said(foretold) == said(expected)
        assert expected.timings.drafted_tokens == 0
        accepted += foretold.timings.accepted_tokens
    assert accepted or settings.get("max_new_tokens", 40) <= 2


def test_tokens_of_fp32_are_those_of_steps_of_one_position(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = accepted = 0
    for text in TEXTS:
        for settings in ({}, {"temperature": 0.7, "seed": 5}, {"repetition_penalty": 1.2}):
            expected = ask(runtime, text, drafts=False, **settings)
            with monkeypatch.context() as patch:
                foretell(patch, expected.token_ids)
                found = ask(runtime, text, **settings)
            assert said(found) == said(expected)
            assert expected.timings.drafted_tokens == expected.timings.accepted_tokens == 0
            drafted += found.timings.drafted_tokens
            accepted += found.timings.accepted_tokens
    assert 0 < accepted < drafted


def test_accepted_tokens_save_steps(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = runtime._engine
    graph, steps = engine._lanes[0].graph, list[int]()
    run_ahead = graph.run_ahead

    def counted(row: int, ids: Sequence[int], length: int) -> Any:
        steps.append(len(ids))
        return run_ahead(row, ids, length)

    foretell(monkeypatch, ask(runtime, TEXTS[0], drafts=False).token_ids)
    monkeypatch.setattr(graph, "run_ahead", counted)
    found = ask(runtime, TEXTS[0])
    assert len(found.token_ids) == 40
    assert found.timings.accepted_tokens > 10
    # The last token ends the answer before it could be compared with its draft.
    assert len(steps) - (39 - found.timings.accepted_tokens) in (0, -1)
    assert set(steps) <= {2, 4, 8}


def test_choices_are_drafts_of_themselves(runtime: Runtime) -> None:
    choices = ("the film was very long and never made", "a bad story")
    found = ask(runtime, "which", choices=choices, logprobs=True)
    expected = ask(runtime, "which", choices=choices, logprobs=True, drafts=False)
    assert found.text == expected.text
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    # The first token decides, and all others follow from it.
    assert found.timings.accepted_tokens > len(found.token_ids) // 2


def test_a_stream_gives_the_same_text(runtime: Runtime) -> None:
    assert "".join(runtime.stream(TEXTS[0], max_new_tokens=40)) == ask(runtime, TEXTS[0], drafts=False).text


def test_to_the_last_position_of_the_base(runtime: Runtime) -> None:
    limit = runtime.manifest.geometry.max_positions
    ids = runtime._package.tokenizer.encode(TEXTS[0] * 20)[: limit - 20]
    for new in (20, 19, 5, 2, 1):
        found = runtime.generate(input_ids=ids, max_new_tokens=new)
        assert found.token_ids == runtime.generate(input_ids=ids, max_new_tokens=new, drafts=False).token_ids


def test_in_company_and_alone(runtime: Runtime) -> None:
    """Requests that join and leave: some of their steps are of a batch, others of several positions."""
    requests = [
        Request(text, prompt, task="generate", options=GenerationOptions(max_new_tokens=5 + 7 * number))
        for number, text in enumerate(TEXTS)
        for prompt in (None, "rows", "deep")
    ]
    expected = []
    for request in requests:
        new = request.options.max_new_tokens
        expected.append(ask(runtime, str(request.text), prompt=request.prompt, max_new_tokens=new, drafts=False))
    assert [said(one) for one in runtime.run(requests)] == [said(one) for one in expected]
    jobs, found = [runtime.submit(request) for request in requests], list[Any]()
    jobs[3].cancel()
    for at, job in enumerate(jobs):
        if at == 3 and isinstance(job.exception(60), RequestCancelledError):
            found.append(expected[at])
        else:
            found.append(job.result(60))
    assert [said(one) for one in found] == [said(one) for one in expected]


def test_cancelled_between_steps(runtime: Runtime) -> None:
    begun = threading.Event()
    request = Request(TEXTS[0], task="generate", options=GenerationOptions(max_new_tokens=200))
    job = runtime._engine.submit(request, None, lambda _: begun.set())
    assert begun.wait(30)
    job.cancel()
    error = job.exception(30)
    assert error is None or isinstance(error, RequestCancelledError)
    assert said(ask(runtime, TEXTS[1])) == said(ask(runtime, TEXTS[1], drafts=False))


def test_a_failing_step_fails_its_request_alone(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = runtime._engine
    with monkeypatch.context() as broken:
        broken.setattr(engine._lanes[0].graph, "run_ahead", lambda *_: np.full((8, 512), np.nan, np.float32))
        with pytest.raises(edgeprompt.EdgePromptError):
            ask(runtime, TEXTS[0])
    assert ask(runtime, TEXTS[0]).token_ids == ask(runtime, TEXTS[0], drafts=False).token_ids


def test_where_drafts_cannot_be_had(tiny_llama_package: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_invariant"):
        EngineOptions(drafts=True, batch_invariant=True)
    growing = growing_package(tiny_llama_package, tmp_path)
    with pytest.raises(UnsupportedError, match="in place"):
        edgeprompt.load(growing, options=DRAFTS)
    with edgeprompt.load(growing, options=QUIET) as runtime, pytest.raises(UnsupportedError, match="in place"):
        runtime.generate("a", drafts=True)
    with edgeprompt.load(without_kept_logits(tiny_llama_package, tmp_path), options=QUIET) as runtime:
        assert runtime.generate("a", max_new_tokens=3).token_ids
        with pytest.raises(UnsupportedError, match="export the base again"):
            runtime.generate("a", drafts=True)


def without_kept_logits(package: Path, folder: Path) -> Path:
    """As packages were before: the last position alone."""
    import hashlib

    import onnx_ir as ir

    from edgeprompt import names

    target = folder / "older"
    target.mkdir()
    for file in package.iterdir():
        if file.name not in (names.MANIFEST, "model.onnx"):
            (target / file.name).symlink_to(file)
    model = ir.load(package / "model.onnx")
    (count,) = (value for value in model.graph.inputs if value.name == names.LOGITS_TO_KEEP)
    (kept,) = (value for value in model.graph.outputs if value.name == names.KEPT_LOGITS)
    model.graph.inputs.remove(count)  # the default of 1 stays
    model.graph.outputs.remove(kept)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    ir.save(model, target / "model.onnx")
    manifest = open_package(package).manifest
    graph = replace(
        manifest.graphs["model"], sha256=hashlib.sha256((target / "model.onnx").read_bytes()).hexdigest(), data={}
    )
    replace(manifest, graphs={"model": graph}).write(target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(
    family: str, save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fp32, the same to the last bit with drafts and without, and the same tokens as steps of one position."""
    from exporters import export_model

    package = export_model(save_tiny(loaded_decoder(family).model), tmp_path / "package", precision="fp32").path
    accepted = 0
    with edgeprompt.load(package, options=DRAFTS) as runtime:
        for text in TEXTS:
            for settings in SETTINGS:
                plain = ask(runtime, text, drafts=False, **settings)
                with monkeypatch.context() as patch:
                    foretell(patch, plain.token_ids)
                    found = ask(runtime, text, **settings)
                    no_drafts(patch)
                    same = ask(runtime, text, **settings)
                assert said(found) == said(same)
                assert found.token_ids == plain.token_ids
                accepted += found.timings.accepted_tokens
    assert accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantised_answers_do_not_depend_on_what_was_drafted(
    precision: str, smollm2_gguf: Path, cached_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = cached_package(f"smollm2-{precision}", smollm2_gguf, precision=precision)
    with edgeprompt.load(package, options=DRAFTS) as runtime:
        asked = [(text, settings) for text in TEXTS for settings in SETTINGS]
        found = [ask(runtime, text, **settings) for text, settings in asked]
        no_drafts(monkeypatch)
        same = [ask(runtime, text, **settings) for text, settings in asked]
    assert [said(one) for one in found] == [said(one) for one in same]
    assert sum(one.timings.accepted_tokens for one in found) > 0
