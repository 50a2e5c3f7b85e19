"""Random prompts with heads for encoders, and requests that mix them."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprompt import PromptFile, Request, Runtime
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_prompt

LINEAR = (HeadStep("linear", "classifier"),)


def with_head(runtime: Runtime, name: str, outputs: int, source: str = "first_text", **fields: Any) -> PromptFile:
    """A random prompt with a random linear head."""
    rng = np.random.default_rng(outputs)
    size = runtime.manifest.geometry.hidden_size
    problem = fields.pop("problem_type", "single_label")
    fields.setdefault("task", "classify")
    fields.setdefault("labels", tuple(f"label {index}" for index in range(outputs)))
    fields.setdefault("template", Template.parse("{prompt}{text}"))
    return make_prompt(
        runtime.manifest,
        name,
        fields.pop("method", "prompt-tuning"),
        head={"classifier.weight": rng.normal(0, 0.1, (outputs, size)).astype(np.float32)},
        head_spec=Head(source, LINEAR, problem),
        **fields,
    )


def add_all(runtime: Runtime) -> None:
    """Prompts of several tasks, methods, lengths and label counts."""
    question = Template.parse("{prompt}{question}{context}")
    tags = ("O", "B-x", "I-x")
    for prompt in (
        with_head(runtime, "two", 2, "pooler", count=3),
        with_head(runtime, "five", 5, "mean", count=9, seed=1),
        with_head(runtime, "deep", 3, "first_text", method="p-tuning-v2", count=6),
        with_head(runtime, "deep, short", 4, "last", method="prefix-tuning", count=1),
        with_head(runtime, "tag", 3, "tokens", task="tag", labels=tags, count=4),
        with_head(runtime, "qa", 2, "tokens", task="qa", labels=(), count=2, template=question),
    ):
        runtime.add_prompt(prompt)


def mixed_requests(texts: list[str]) -> list[Request]:
    names = ["two", "five", "deep", "deep, short", "tag", "qa", None]
    found = []
    for index, text in enumerate(texts):
        name = names[index % len(names)]
        found.append(Request({"question": "What is it about?", "context": text} if name == "qa" else text, name))
    return found
