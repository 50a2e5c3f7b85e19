"""A method for every task, on every architecture that has it; what is no request is named."""

from __future__ import annotations

import inspect
import json
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Answer, EdgePromptError, InputError, Request, Runtime, Tagging, UnsupportedError
from edgeprompt.prompts.template import Template
from tests.support.encoder_prompts import with_head
from tests.support.runtimes import QUIET, load_with_prompts

ARCHITECTURES = ("decoder", "encoder", "encoder-decoder")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def encoder(encoder_package: Callable[..., Path]) -> Iterator[Runtime]:
    with edgeprompt.load(encoder_package("BERT"), options=QUIET) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def seq2seq(seq2seq_package: Callable[..., Path]) -> Iterator[Runtime]:
    with edgeprompt.load(seq2seq_package("T5"), options=QUIET) as runtime:
        yield runtime


@pytest.fixture
def any_runtime(request: pytest.FixtureRequest) -> Callable[[str], Runtime]:
    names = {"decoder": "runtime", "encoder": "encoder", "encoder-decoder": "seq2seq"}
    return lambda architecture: request.getfixturevalue(names[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tag(architecture: str, any_runtime: Callable[[str], Runtime]) -> None:
    runtime = any_runtime(architecture)
    runtime.add_prompt(with_head(runtime, "tags", 3, "tokens", task="tag", labels=("O", "B-x", "I-x")))
    one, two = runtime.tag(["the film", "a story of it"], prompt="tags")
    assert isinstance(one, Tagging)
    assert [len(found.words) for found in (one, two)] == [2, 4]
    assert runtime.tag("the film", prompt="tags").words[0].text == "the"
    if architecture != "encoder":
        return
    with pytest.raises(InputError, match="needs a prompt"):
        runtime.tag("the film")


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
@pytest.mark.parametrize("slots", ["{prompt}{question} {context}", "{prompt}{context} {asked}"])
def test_answer(architecture: str, slots: str, any_runtime: Callable[[str], Runtime]) -> None:
    runtime = any_runtime(architecture)
    prompt = with_head(runtime, "qa", 2, "tokens", task="qa", labels=(), template=Template.parse(slots))
    runtime.add_prompt(prompt)
    question, context = "who ?", "the film was made by nobody"
    found = runtime.answer(question, context, prompt="qa")
    assert isinstance(found, Answer)
    assert context[found.start : found.end] == found.text
    other = "asked" if "asked" in slots else "question"
    assert found == runtime.run([Request({other: question, "context": context}, "qa")])[0]
    assert runtime.answer([question, question], [context, "a story"], prompt="qa")[0].text == found.text
    with pytest.raises(InputError, match="as many questions as contexts"):
        runtime.answer([question], [context, context], prompt="qa")
    with pytest.raises(InputError, match="needs a prompt"):
        runtime.answer(question, context)
    asked: Any = runtime.answer
    for wrong in ((None, None), (5, ["a"]), (np.array(["a", "b"]), "a"), ({"a"}, {"b"}), ("a", None)):
        with pytest.raises(InputError, match="lists of as many"):
            asked(*wrong, prompt="qa")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ids_without_texts_are_embedded(architecture: str, any_runtime: Callable[[str], Runtime]) -> None:
    runtime = any_runtime(architecture)
    ids = [[5, 6, 7], [8, 9]]
    found = runtime.embed(input_ids=ids)
    assert found.shape == (2, runtime.manifest.geometry.hidden_size)
    np.testing.assert_allclose(found[1], runtime.run([Request(input_ids=ids[1], task="embed")])[0], atol=1e-5)
    assert runtime.embed([]).shape == (0, runtime.manifest.geometry.hidden_size)


def spoil_states(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's hidden states (an encoder's outputs) become NaN."""
    engine: Any = runtime._engine
    if runtime.manifest.architecture == "encoder-only":
        owner, name = type(engine._graph), "run"
    elif runtime.manifest.architecture == "decoder-only":
        owner, name = engine._lanes[0].graph, "prefill"
    else:
        owner, name = engine._graphs, "encode"
    real = getattr(owner, name)

    def spoiled(*given: Any) -> Any:
        found = real(*given)
        if name == "run":
            return [{key: np.full_like(value, np.nan) for key, value in outputs.items()} for outputs in found]
        (given[4][-1] if name == "prefill" else found.states)[...] = np.nan
        return found

    monkeypatch.setattr(owner, name, spoiled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_are_finite_or_an_error(
    architecture: str, any_runtime: Callable[[str], Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = any_runtime(architecture)
    spoil_states(runtime, monkeypatch)
    with pytest.raises(EdgePromptError, match="NaN or infinite"):
        runtime.embed(["the film", "a film that is longer"])
    if architecture == "encoder":
        with pytest.raises(EdgePromptError, match="NaN or infinite"):
            runtime.logits(input_ids=[5, runtime.manifest.tokens.mask or 0, 6])


def test_chat_is_a_conversation_in_the_template(tiny_llama_package: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    package = Path(shutil.copytree(tiny_llama_package, tmp_path / "package"))
    (package / "chat_template.jinja").write_text(CHAT)
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a film"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "and a story"},
    ]
    with load_with_prompts(package) as runtime:
        text = "<system>be short\n<user>a film\n<assistant>good\n<user>and a story\n<assistant>"
        written = runtime.generate(text, max_new_tokens=6)
        assert runtime.chat(turns, max_new_tokens=6).token_ids == written.token_ids
        assert runtime.generate(messages=turns, max_new_tokens=6).token_ids == written.token_ids
        assert "".join(runtime.stream(messages=turns, max_new_tokens=6)) == written.text
        assert runtime.chat(turns, prompt="story", max_new_tokens=3).token_ids
        for wrong, match in (([], "at least one"), ([{"role": "user"}], "role"), (turns[:3], "last message")):
            with pytest.raises(InputError, match=match):
                runtime.chat(wrong)
        with pytest.raises(InputError, match="not several"):
            runtime.generate("a", messages=turns)


@pytest.mark.parametrize("architecture", ["encoder", "encoder-decoder"])
def test_chats_and_sessions_need_a_decoder(
    architecture: str, any_runtime: Callable[[str], Runtime], tmp_path: Path
) -> None:
    runtime = any_runtime(architecture)
    with pytest.raises(UnsupportedError):
        runtime.chat([{"role": "user", "content": "a"}])
    with pytest.raises(UnsupportedError, match="only decoder-only packages"):
        runtime.save_session(tmp_path / "x", "a")
    with pytest.raises(UnsupportedError, match="only decoder-only packages"):
        runtime.load_session(tmp_path / "x")


def test_a_request_is_streamed(runtime: Runtime) -> None:
    request = Request("the film", "story")
    assert "".join(runtime.stream(request)) == runtime.run([request])[0].text
    with pytest.raises(InputError, match="not both"):
        runtime.stream(request, max_new_tokens=3)
    with pytest.raises(UnsupportedError, match="no text to stream"):
        runtime.stream(Request("the film", "words", task="classify"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_wrong_is_an_error_of_ours(architecture: str, any_runtime: Callable[[str], Runtime]) -> None:
    runtime = any_runtime(architecture)
    for call in (
        lambda: runtime.run(["text"]),
        lambda: runtime.submit("text"),
        lambda: runtime.classify(5),
        lambda: runtime.classify("a", prompt=5),
        lambda: runtime.classify("a", max_new_tokens=5),
        lambda: runtime.generate("a", prompt="nobody"),
        lambda: runtime.generate("a", max_new_tokens="three"),
        lambda: runtime.embed("a"),
        lambda: runtime.embed(["a"], pooling="sum"),
        lambda: runtime.embed(input_ids=5),
        lambda: runtime.embed(["a"], input_ids=[[5]]),
        lambda: runtime.classify("a", prompt="words", input_ids=[5]),
        lambda: runtime.classify(["a", "b"], prompt="words", input_ids=[5]),
        lambda: runtime.generate("a", input_ids=[5]),
        lambda: runtime.generate(input_ids=[5], chat=True),
        lambda: runtime.logits("a", input_ids=[5]),
        lambda: runtime.run(Request("a")),
        lambda: runtime.run(request for request in [Request("a")]),
        lambda: runtime.prompt(5),
        lambda: runtime.prompt("nobody"),
        lambda: runtime.add_prompt(5),
        lambda: runtime.add_prompt("nothing.safetensors"),
        lambda: runtime.add_folder(5),
        lambda: runtime.remove_prompt("nobody"),
        lambda: runtime.check("nobody"),
        lambda: edgeprompt.load(5),
        lambda: edgeprompt.EngineOptions(max_batch="many"),
    ):
        with pytest.raises(EdgePromptError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_every_type_of_a_signature_is_public() -> None:
    public = set(edgeprompt.__all__)
    named: set[str] = set()
    for name, member in inspect.getmembers(Runtime):
        if not name.startswith("_") and callable(member):
            text = json.dumps([str(one) for one in typing.get_type_hints(member).values()])
            named |= {
                word.split(".")[-1]
                for word in text.replace("[", " ").replace("]", " ").replace(",", " ").split()
                if "edgeprompt." in word
            }
    strip = {word.strip("'>\"\\") for word in named}
    assert strip <= public, strip - public


WRONG = (b"good", 1.5, ("a", 5), {5: "a"}, {"text": None}, np.array("a"), np.array(["a", "b"]), {"a"}, object())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_values_of_wrong_types_are_named(value: Any, architecture: str, any_runtime: Callable[[str], Runtime]) -> None:
    runtime = any_runtime(architecture)
    for call in (
        runtime.logits,
        lambda value: runtime.embed([value]),
        runtime.run,
        runtime.submit,
        runtime.submit_all,
        lambda value: runtime.run_tasks("a", value),
        runtime.prompt,
        runtime.describe,
        runtime.check,
        runtime.remove_prompt,
        runtime.add_prompt,
        runtime.add_folder,
        edgeprompt.load,
        runtime.chat,
        lambda value: runtime.generate(messages=value),
        lambda value: Request("a", task=value),
        lambda value: Request("a", chat=value),
        lambda value: Request("a", truncate=value),
        lambda value: Request("a", pooling=value),
        *(
            lambda value, name=name: runtime.generate("a", **{name: value})
            for name in ("logprobs", "num_beams", "drafts", "stop", "choices")
        ),
    ):
        with pytest.raises(EdgePromptError):
            call(value)


def test_a_text_that_is_no_path_is_named(runtime: Runtime) -> None:
    for path in ("\ud800", "a\0b"):
        for read in (runtime.add_prompt, runtime.add_folder, edgeprompt.load):
            with pytest.raises(EdgePromptError):
                read(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lists_keep_their_order_or_are_refused(architecture: str, any_runtime: Callable[[str], Runtime]) -> None:
    runtime: Any = any_runtime(architecture)
    ids = runtime.tokenizer.encode("the film")
    expected = runtime.embed(input_ids=[ids])
    for given in (np.array([ids]), (one for one in [ids]), [np.array(ids, np.int16)], [iter(ids)], (tuple(ids),)):
        assert np.array_equal(runtime.embed(input_ids=given), expected)
    for wrong in ([set(ids)], [dict.fromkeys(ids)], [bytes(len(ids))], {tuple(ids)}, np.array(5), "56", ids):
        with pytest.raises(InputError, match=r"integers|a list of the ids"):
            runtime.embed(input_ids=wrong)
    with pytest.raises(InputError, match="found set"):
        runtime.embed({"the film", "a story"})
    with pytest.raises(InputError, match="prompts' names; found str"):
        runtime.run_tasks("the film", "words")
    if architecture == "decoder":
        assert len(runtime.run_tasks("the film", (name for name in ("words", "story")))) == 2
        with pytest.raises(InputError, match="at least one text"):
            runtime.calibration("words", [])


def test_what_is_no_request_fails_alone(runtime: Runtime) -> None:
    request = Request("the film", task="logits")
    wrong, right, other = runtime.run([5, request, None], return_errors=True)  # type: ignore[list-item]
    assert str(wrong) == "a request is int; give Request(...)"
    assert np.array_equal(right, runtime.run([request])[0])  # type: ignore[arg-type]
    assert isinstance(other, InputError)
    with pytest.raises(InputError, match="2 requests and 1 on_text"):
        runtime.submit_all([request, request], [print])
