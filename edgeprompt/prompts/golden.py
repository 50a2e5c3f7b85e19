"""Golden examples: does a prompt answer here as it did where it was made?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeprompt.errors import InputError, ValidationError
from edgeprompt.prompts.file import Golden, PromptFile
from edgeprompt.request import Answer, Classification, Generation, GenerationOptions, Request, Result, Tagging


@dataclass(frozen=True)
class GoldenCheck:
    """The answer to a prompt's golden example (`found`), and the answer stored in its file (`expected`)."""

    passed: bool
    expected: str | tuple[int, ...]
    found: str | tuple[int, ...]
    max_logit_difference: float | None = None


def questions(prompt: PromptFile) -> list[Request]:
    """What to ask, for `compare`; `prompt.name` is the name that requests use.

    Raises:
        InputError: the prompt file holds no golden example, or one without an answer.
    """
    golden = prompt.golden
    if golden is None:
        raise InputError(f"prompt {prompt.name!r} holds no golden example; tune stores one")
    if prompt.task != "generate":
        return [Request(golden.fields, prompt.name)]
    if not golden.token_ids:
        raise _nothing_named(prompt)
    options = GenerationOptions(max_new_tokens=len(golden.token_ids), temperature=0)
    asked = [Request(golden.fields, prompt.name, task="generate", options=options)]
    return [*asked, Request(golden.fields, prompt.name, task="logits")] if golden.logits else asked


def compare(prompt: PromptFile, results: Sequence[Result]) -> GoldenCheck:
    """Compare the answers to `questions`: the label (tagging: the first word's), the answer to a question, the values
    of a regression to a tenth, or the first tokens.

    Raises:
        InputError: the golden example has nothing to compare with.
    """
    golden = prompt.golden
    assert golden is not None
    match results[0]:
        case Generation() as result:
            return _tokens(prompt, golden, result, results[1:])
        case Tagging(words=words):
            label, logits = (words[0].label if words else ""), dict[str, float]()
        case Classification() as result:
            label, logits = result.label, dict(result.logits)
        case Answer() as result:
            label, logits = result.text, {}
        case _:
            raise InputError(f"prompt {prompt.name!r} is for {prompt.task!r}, which gives nothing to compare")
    differences = [abs(value - logits[key]) for key, value in golden.logits.items() if key in logits]
    largest = max(differences) if differences else None
    if golden.label is not None:
        return GoldenCheck(label == golden.label, golden.label, label, largest)
    if largest is None:
        raise _nothing_named(prompt)
    expected, found = (", ".join(f"{values[key]:g}" for key in golden.logits) for values in (golden.logits, logits))
    return GoldenCheck(largest <= 0.1 * max(1.0, *map(abs, golden.logits.values())), expected, found, largest)


def _tokens(prompt: PromptFile, golden: Golden, answer: Generation, more: Sequence[Result]) -> GoldenCheck:
    found, expected = answer.token_ids[: len(golden.token_ids)], tuple(golden.token_ids)
    differences = []
    for logits in more:
        assert not isinstance(logits, Answer | Classification | Generation | Tagging)
        beyond = next((key for key in golden.logits if int(key) >= logits.size), None)
        if beyond is not None:
            raise InputError(
                f"the golden example of prompt {prompt.name!r} names token {beyond}; the base has {logits.size}"
            )
        differences = [abs(value - float(logits[int(key)])) for key, value in golden.logits.items()]
    return GoldenCheck(found == expected, expected, found, max(differences) if differences else None)


def _nothing_named(prompt: PromptFile) -> InputError:
    return InputError(f"the golden example of prompt {prompt.name!r} names neither a label nor tokens")


class Checks(Protocol):
    """What `check_all` needs of a runtime."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of its prompts."""

    def prompt(self, name: str) -> PromptFile:
        """A prompt by name."""

    def check(self, prompt: str) -> GoldenCheck:
        """Ask a prompt its golden example, and compare."""


def check_all(runtime: Checks) -> dict[str, GoldenCheck]:
    """Check every prompt of a runtime that holds a golden example which can be compared.

    Raises:
        ValidationError: one answers otherwise; both answers are named.
    """
    found: dict[str, GoldenCheck] = {}
    for name in runtime.prompts:
        prompt = runtime.prompt(name)
        if prompt.golden is None or prompt.task == "embed":
            continue
        check = found[name] = runtime.check(name)
        if not check.passed:
            logits = check.max_logit_difference
            apart = "" if logits is None else f" (logits differ by at most {logits:.2g})"
            raise ValidationError(
                f"prompt {name!r} answers its golden example with {check.found!r}, and answered {check.expected!r} "
                f"where it was made{apart}; compare what it was made for with this package: edgeprompt inspect both"
            )
    return found
