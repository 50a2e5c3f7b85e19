"""Heads on every token of a decoder: states of a text in pieces, and requests that have no words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgeprompt import PromptFile, Request, Runtime, load
from edgeprompt.errors import InputError
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.template import Template


@pytest.fixture(scope="module")
def runtime(tiny_llama_package: Path) -> Runtime:
    return load(tiny_llama_package, provider="cpu", threads=1)


def tagger(manifest: Manifest, *, source: str = "tokens", task: str = "tag", rows: int = 3) -> PromptFile:
    """A random prompt with a random head on every token."""
    random = np.random.default_rng(3)
    width = manifest.geometry.hidden_size
    labels = ("B-x", "O") if task == "tag" else ()
    return PromptFile(
        name=f"{task} {source}",
        method="prompt-tuning",
        task=task,
        base=manifest.base,
        template=Template.parse("{prompt}{text}" if task == "tag" else "{prompt}{question} {context}"),
        prompt_embeddings=random.normal(size=(rows, width)).astype(np.float32),
        labels=labels,
        head={"score.weight": random.normal(size=(2, width)).astype(np.float32)},
        head_spec=Head(source, (HeadStep("linear", "score"),), "single_label"),
    )


def test_a_text_in_pieces_gives_the_same_words(
    runtime: Runtime, tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_package(tiny_llama_package).manifest
    name = runtime.add_prompt(tagger(manifest))
    text = "the film is great , the story was bad and the music terrible ."
    (whole,) = runtime.run([Request(text, prompt=name)])
    monkeypatch.setattr(runtime._engine._lanes[0].graph, "chunk", 4)
    (pieces,) = runtime.run([Request(text, prompt=name)])
    assert len(whole.words) == len(text.split())
    assert [word.label for word in pieces.words] == [word.label for word in whole.words]
    assert np.allclose([word.score for word in pieces.words], [word.score for word in whole.words], atol=1e-5)
    assert len({round(word.score, 4) for word in whole.words}) > 3  # the words' own states


def test_unshifted_positions_read_virtual_tokens(runtime: Runtime, tiny_llama_package: Path) -> None:
    manifest = open_package(tiny_llama_package).manifest
    fields = {"question": "was it great ?", "context": "the film is great ."}
    found = []
    for source in ("tokens", "tokens_unshifted"):
        (answer,) = runtime.run(
            [Request(fields, prompt=runtime.add_prompt(tagger(manifest, source=source, task="qa")))]
        )
        found.append((answer.start, answer.end, answer.score))
        assert fields["context"][answer.start : answer.end] == answer.text
    assert found[0] != found[1]


def test_ids_have_no_words(runtime: Runtime, tiny_llama_package: Path) -> None:
    prompt = tagger(open_package(tiny_llama_package).manifest)
    name = runtime.add_prompt(prompt)
    with pytest.raises(InputError, match="give text instead of input_ids"):
        runtime.run([Request(input_ids=[1, 2], prompt=name)])
    with pytest.raises(InputError, match="trained for it"):
        runtime.run([Request("a", task="tag")])
    labels = dataclasses.replace(prompt, name="three", labels=("a", "b", "c"))
    with pytest.raises(InputError, match="2 scores for 3 labels"):
        runtime.add_prompt(labels)
