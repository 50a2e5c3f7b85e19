"""Golden examples: does a prompt answer here as it did where it was made?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeprompt.errors import InputError, ValidationError
from edgeprompt.prompts.file import Golden
from edgeprompt.request import Answer, Classification, Request, Tagging

if TYPE_CHECKING:
    from edgeprompt.runtime import Runtime


@dataclass(frozen=True)
class GoldenCheck:
    """What a prompt answered to its golden example, beside what it answered where it was made."""

    passed: bool
    expected: str | tuple[int, ...]
    found: str | tuple[int, ...]
    max_logit_difference: float | None = None


def check_golden(runtime: Runtime, name: str) -> GoldenCheck:
    """Ask a prompt its golden example, and compare: the label (tagging: the first word's), the answer to a question,
    the values of a regression to a tenth, or the first tokens.

    Raises:
        InputError: the prompt file holds no golden example, or one without an answer.
    """
    prompt = runtime.prompt(name)
    golden = prompt.golden
    if golden is None:
        raise InputError(f"prompt {name!r} holds no golden example; tune stores one")
    if prompt.task == "generate":
        return _generated(runtime, name, golden)
    (result,) = runtime.run([Request(golden.fields, name)])
    logits: Mapping[str, float] = {}
    if isinstance(result, Tagging):
        label = result.words[0].label if result.words else ""
    elif isinstance(result, Classification):
        label, logits = result.label, result.logits
    elif isinstance(result, Answer):
        label = result.text
    else:
        raise InputError(f"prompt {name!r} is for {prompt.task!r}, which gives nothing to compare")
    differences = [abs(value - logits[key]) for key, value in golden.logits.items() if key in logits]
    largest = max(differences) if differences else None
    if golden.label is not None:
        return GoldenCheck(label == golden.label, golden.label, label, largest)
    if largest is None:
        raise InputError(f"the golden example of prompt {name!r} names neither a label nor tokens")
    expected, found = (", ".join(f"{values[key]:g}" for key in golden.logits) for values in (golden.logits, logits))
    return GoldenCheck(largest <= 0.1 * max(1.0, *map(abs, golden.logits.values())), expected, found, largest)


def _generated(runtime: Runtime, name: str, golden: Golden) -> GoldenCheck:
    if not golden.token_ids:
        raise InputError(f"the golden example of prompt {name!r} names neither a label nor tokens")
    answer = runtime.generate(golden.fields, prompt=name, max_new_tokens=len(golden.token_ids), temperature=0)
    found, expected = answer.token_ids[: len(golden.token_ids)], tuple(golden.token_ids)
    logits = runtime.logits(golden.fields, prompt=name) if golden.logits else np.empty(0)
    beyond = next((key for key in golden.logits if int(key) >= logits.size), None)
    if beyond is not None:
        raise InputError(f"the golden example of prompt {name!r} names token {beyond}; the base has {logits.size}")
    differences = [abs(value - float(logits[int(key)])) for key, value in golden.logits.items()]
    return GoldenCheck(found == expected, expected, found, max(differences) if differences else None)


def check_all(runtime: Runtime) -> dict[str, GoldenCheck]:
    """Check every prompt of a runtime that holds a golden example which can be compared.

    Raises:
        ValidationError: one answers otherwise; both answers are named.
    """
    found: dict[str, GoldenCheck] = {}
    for name in runtime.prompts:
        prompt = runtime.prompt(name)
        if prompt.golden is None or prompt.task == "embed":
            continue
        check = found[name] = check_golden(runtime, name)
        if not check.passed:
            raise ValidationError(
                f"prompt {name!r} answers its golden example with {check.found!r}, and answered {check.expected!r} "
                "where it was made; it may be for other weights (edgeprompt inspect tells)"
            )
    return found
