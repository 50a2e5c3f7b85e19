"""Label words at the mask of an encoder, on a small random BERT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Classification, Request
from edgeprompt.errors import TemplateError
from edgeprompt.prompts.template import Template
from tests.support.encoder_prompts import add_all, mixed_requests
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET


@pytest.fixture(scope="module")
def cloze(encoder_package: Callable[..., Path]) -> Iterator[edgeprompt.Runtime]:
    with edgeprompt.load(encoder_package("BERT"), options=QUIET) as runtime:
        yield runtime


def test_cloze_scores_are_those_of_the_masked_language_model(
    cloze: edgeprompt.Runtime, encoder_base: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    tokenizer = cloze._package.tokenizer
    single = [word for word in (" the", " a", " of", " and", " it", " is") if len(tokenizer.encode(word)) == 1]
    words = {"bad": (single[0],), "good": (single[1], single[2])}
    template = Template.parse("{prompt}{text} It was{mask}.")
    prompt = make_prompt(cloze.manifest, "cloze", task="classify", verbalizer=words, template=template)
    cloze.add_prompt(prompt)
    found = cloze.classify("a story", prompt="cloze")
    model = AutoModelForMaskedLM.from_pretrained(encoder_base("BERT")).eval()
    ids = torch.tensor([tokenizer.encode("a story It was<mask>.")])
    rows = torch.from_numpy(np.asarray(prompt.prompt_embeddings))[None]
    with torch.no_grad():
        embedded = torch.cat([rows, model.get_input_embeddings()(ids)], 1)
        at = rows.shape[1] + ids[0].tolist().index(tokenizer.token_to_id("<mask>"))
        logits = model(inputs_embeds=embedded).logits[0, at]
    np.testing.assert_allclose(cloze.logits("a story", prompt="cloze"), logits.numpy(), atol=1e-3)
    chances = logits.log_softmax(-1)
    for label, options in words.items():
        want = torch.logsumexp(torch.stack([chances[tokenizer.encode(word)[0]] for word in options]), 0)
        assert found.logits[label] == pytest.approx(float(want), abs=1e-3)


def test_a_batch_of_cloze_and_heads(cloze: edgeprompt.Runtime) -> None:
    words = {"x": ("a",), "y": ("e",)}
    template = Template.parse("{text} It was{mask}.")
    cloze.add_prompt(
        make_prompt(cloze.manifest, "words", "p-tuning-v2", task="classify", verbalizer=words, template=template)
    )
    add_all(cloze)
    requests = [
        Request("a story", "words"),
        *mixed_requests(["the film", "a"] * 4),
        Request("longer than the first", "words"),
    ]
    for request, got in zip(requests, cloze.run(requests), strict=True):
        want = cloze.run([request])[0]
        if isinstance(want, Classification):
            assert got.logits == pytest.approx(want.logits, abs=1e-4)


def test_label_words_must_fit_the_mask(cloze: edgeprompt.Runtime) -> None:
    long = {"a": (" unbelievable words",), "b": ("e",)}
    with pytest.raises(TemplateError, match="tokens; a mask stands for one"):
        cloze.add_prompt(
            make_prompt(cloze.manifest, "w", verbalizer=long, template=Template.parse("{prompt}{text}{mask}"))
        )
    with pytest.raises(TemplateError, match="in the template, found 0"):
        cloze.add_prompt(make_prompt(cloze.manifest, "w", verbalizer=long))
