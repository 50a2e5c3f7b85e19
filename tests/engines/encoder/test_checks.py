"""What the encoder engine refuses: prompts when they are added, requests one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Classification, Request
from edgeprompt.errors import (
    BaseMismatchError,
    EdgePromptError,
    InputError,
    RequestTimeoutError,
    TemplateError,
    UnsupportedError,
)
from edgeprompt.prompts.template import Template
from tests.support.encoder_prompts import with_head
from tests.support.runtimes import QUIET


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"template": Template.parse("{text}")}, TemplateError, "no {prompt}"),
        ({"task": "generate"}, UnsupportedError, "do not generate"),
        ({"task": "tag"}, InputError, "its head reads 'first_text'"),
        ({"labels": ("one",)}, InputError, "gives 2 scores for 1 labels"),
        ({"head_spec": None, "head": {}}, InputError, "neither a head nor a verbalizer"),
        (
            {"head_spec": None, "head": {}, "verbalizer": {"a": ("b",), "c": ("d",)}},
            UnsupportedError,
            "no masked language model",
        ),
        (
            {"head": {"classifier.weight": np.ones((2, 7), np.float32)}},
            BaseMismatchError,
            "does not fit hidden size 384",
        ),
    ],
)
def test_prompts_that_cannot_work_are_refused(
    minilm: edgeprompt.Runtime, change: dict[str, Any], kind: type[EdgePromptError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        minilm.add_prompt(dataclasses.replace(with_head(minilm, "bad", 2), **change))
    assert message in str(caught.value)


def test_heads_on_a_pooler_that_nobody_trained_are_refused(encoder_package: Callable[..., Path]) -> None:
    with (
        edgeprompt.load(encoder_package("RoBERTa"), options=QUIET) as runtime,
        pytest.raises(BaseMismatchError, match="no trained pooler"),
    ):
        runtime.add_prompt(with_head(runtime, "pooled", 2, "pooler"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", "two", task="tag"), "is for 'classify', not for 'tag'"),
        (Request("a", None, task="classify"), "needs a prompt"),
        (Request("a", None, task="generate"), "do not generate"),
        (Request("", "tag", input_ids=[5]), "needs the text"),
        (Request("", "two", input_ids=[30522]), "ids of this base are 0 to 30521"),
        (Request("word " * 600, "two"), "at most 512 fit"),
        (Request({"question": "a"}, "qa"), "needs 'context'"),
        (Request("a", "two", timeout=0.0), "timeout passed before it finished"),
    ],
)
def test_requests_that_cannot_work_fail_alone(minilm: edgeprompt.Runtime, request_: Request, message: str) -> None:
    found = minilm.run([Request("fine", "two"), request_], return_errors=True)
    assert isinstance(found[0], Classification)
    assert message in str(found[1])
    kinds = (InputError, UnsupportedError, RequestTimeoutError)
    assert isinstance(found[1], kinds)
    with pytest.raises(kinds):
        minilm.run([request_])
