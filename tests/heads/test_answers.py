"""What an encoder's heads answer: labels, tags, spans."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Request, Span
from edgeprompt.heads.answers import answer, join_words, token_logits
from edgeprompt.prompts.encoder_text import words_of
from edgeprompt.prompts.file import Head
from edgeprompt.prompts.template import Template
from tests.support.encoder_prompts import LINEAR, with_head


def test_multi_label_and_regression(minilm: edgeprompt.Runtime) -> None:
    minilm.add_prompt(with_head(minilm, "many", 4, problem_type="multi_label"))
    found = minilm.classify("a fine film", prompt="many")
    chances = {label: 1 / (1 + np.exp(-logit)) for label, logit in found.logits.items()}
    assert found.scores == pytest.approx(chances, abs=1e-6)
    assert set(found.labels) == {label for label, chance in chances.items() if chance > 0.5}
    minilm.add_prompt(with_head(minilm, "rating", 1, problem_type="regression", labels=("rating",)))
    found = minilm.classify("a fine film", prompt="rating")
    assert (found.scores, list(found.logits)) == ({}, ["rating"])
    assert float(found.label) == pytest.approx(found.logits["rating"], abs=1e-6)


def test_tagging_labels_words_and_joins_them(minilm: edgeprompt.Runtime) -> None:
    text = "The quick, brown fox jumps"
    found = minilm.run([Request(text, "tag")])[0]
    assert [word.text for word in found.words] == text.split()
    assert all(text[span.start : span.end] == span.text for span in (*found.words, *found.spans))


def test_words_join_by_bio() -> None:
    text = "Ada Lovelace met Bob Smith Ann in Rome"
    labels = ["B-P", "I-P", "O", "I-P", "I-P", "B-P", "O", "city"]
    words = [Span(label, *place, text[slice(*place)], 0.5) for label, place in zip(labels, words_of(text), strict=True)]
    assert [(span.label, span.text) for span in join_words(words, text)] == [
        ("P", "Ada Lovelace"), ("P", "Bob Smith"), ("P", "Ann"), ("city", "Rome"),
    ]  # fmt: skip


def test_the_best_span_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    context = "abcdefghijklmnopqrstuvwxyz" * 2
    offsets = [None] * 4 + [(place, place + 1) for place in range(50)] + [None]
    for _ in range(20):
        logits = rng.normal(0, 1, (len(offsets), 2)).astype(np.float32)
        pairs = [(i, j) for i in range(4, 54) for j in range(i, min(i + 30, 54))]
        first, last = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
        found = answer(logits, offsets, context)
        assert (found.start, found.end) == (first - 4, last - 3)
        assert found.text == context[found.start : found.end]
    logits[0] = 50
    assert answer(logits, offsets, context, no_answer_at=0).text == ""


def test_an_answer_leaves_out_the_space_in_front_of_its_first_word() -> None:
    context = "It was I."
    offsets = [None, (0, 2), (2, 6), (6, 8), (8, 9)]  # as byte-level tokens have them
    logits = np.zeros((5, 2), np.float32)
    logits[3] = 5
    found = answer(logits, offsets, context)
    assert (found.text, found.start, found.end) == ("I", 7, 8)


def test_unshifted_heads_answer_for_the_token_that_peft_means(minilm: edgeprompt.Runtime) -> None:
    shifted = with_head(
        minilm, "q1", 2, "tokens", task="qa", labels=(), template=Template.parse("{prompt}{question}{context}")
    )
    unshifted = dataclasses.replace(shifted, name="q2", head_spec=Head("tokens_unshifted", LINEAR))
    engine: Any = minilm._engine
    fields = {"question": "Who?", "context": "It was I and nobody else."}
    logits = []
    for prompt in (shifted, unshifted):
        minilm.add_prompt(prompt)
        job = engine.prepare(Request(fields, prompt.name), minilm._prompts.find(prompt.name), None)
        (outputs,) = engine._graph.run([job.row()], job.outputs)
        logits.append(token_logits(prompt, outputs["last_hidden_state"], prompt.num_virtual_tokens))
    count = shifted.num_virtual_tokens
    np.testing.assert_array_equal(logits[1][count:], logits[0][:-count])
