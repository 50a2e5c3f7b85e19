"""Baselines without a soft prompt: the same template and label words on the bare base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.template import Literal, Mask, Template

SHOT_SEPARATOR = "\n\n"


def hard_prompt(prompt: PromptFile, text: str, *, name: str) -> PromptFile:
    """The prompt's task with `text` in place of its virtual tokens; empty `text` is zero-shot.

    Raises:
        UnsupportedError: the task is answered by a trained head, which has no counterpart in text.
    """
    if prompt.head_spec is not None:
        raise UnsupportedError(
            f"prompt {prompt.name!r} answers through a trained head; without it the base has no answer to compare with"
        )
    parts = prompt.template.without_prompt().parts
    return dataclasses.replace(
        prompt,
        name=name,
        template=Template((Literal(text), *parts) if text else parts),
        prompt_embeddings=None,
        past_key_values=None,
        is_infix=False,
        encoder_past_key_values=None,
        calibration=(),
        tuned_for=None,
        training={},
        golden=None,
        distilled_from={},
    )


def teacher_prompt(prompt: PromptFile, *, name: str) -> PromptFile:
    """The instruction that a prompt was distilled from, with its solved examples, as a prompt of text alone.

    Raises:
        InputError: the prompt was not distilled from an instruction.
    """
    source = prompt.distilled_from
    if "template" not in source or "prompt" in source:
        raise InputError(
            f"prompt {prompt.name!r} was not distilled from an instruction, so it has none to compare with"
        )
    return dataclasses.replace(
        hard_prompt(prompt, "", name=name),
        template=Template.parse(str(source["template"])),
        add_special_tokens=bool(source.get("add_special_tokens", True)),
        calibration=tuple(map(float, source.get("calibration", ()))),
    )


def few_shot_text(prompt: PromptFile, examples: Sequence[tuple[Mapping[str, str], str]]) -> str:
    """Solved examples in the prompt's template, as text to stand before the question.

    Args:
        prompt: whose template and label words are used.
        examples: (fields, label or target text).

    Raises:
        InputError: a label has no label word, or an example lacks a field of the template.
    """
    return "".join(_solved(prompt, fields, answer) + SHOT_SEPARATOR for fields, answer in examples)


def _solved(prompt: PromptFile, fields: Mapping[str, str], answer: str) -> str:
    if prompt.verbalizer and answer not in prompt.verbalizer:
        raise InputError(f"label {answer!r} has no label word; the prompt knows {', '.join(prompt.verbalizer)}")
    word = prompt.verbalizer[answer][0] if prompt.verbalizer else answer
    template = prompt.template.without_prompt()
    missing = [name for name in template.slots if name not in fields]
    if missing:
        raise InputError(f"an example lacks {missing[0]!r}; it has {', '.join(fields) or 'nothing'}")
    masked = any(isinstance(part, Mask) for part in template.parts)
    text = "".join(
        part.text if isinstance(part, Literal) else word if isinstance(part, Mask) else fields[part.name]  # type: ignore[union-attr]
        for part in template.parts
    )
    return text if masked else text + word
