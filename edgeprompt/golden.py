"""Golden examples: does a prompt answer here as it did where it was made?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeprompt.errors import InputError

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
    """Ask a prompt its golden example, and compare.

    Raises:
        InputError: the prompt file holds no golden example.
    """
    golden = runtime.prompt(name).golden
    if golden is None:
        raise InputError(f"prompt {name!r} holds no golden example; tune stores one")
    if golden.label is not None:
        result = runtime.classify(golden.fields, prompt=name)
        differences = [abs(value - result.logits[key]) for key, value in golden.logits.items() if key in result.logits]
        passed = result.label == golden.label
        return GoldenCheck(passed, golden.label, result.label, max(differences) if differences else None)
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
