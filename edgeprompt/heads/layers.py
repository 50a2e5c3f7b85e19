"""Task heads in numpy: a few small matrices that travel in the prompt file, applied row by row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import require_finite
from edgeprompt.errors import BaseMismatchError, InputError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import Array, Head, PromptFile

Floats = npt.NDArray[np.float32]

_EPSILON = 1e-5


def apply_head(head: Head, tensors: Mapping[str, Array], states: Floats) -> Floats:
    """Run a head's steps.

    Args:
        head: Its description.
        tensors: Its tensors, by name without "head.".
        states: float32 `[n, hidden_size]`.

    Returns:
        float32 `[n, num_labels]`.

    Raises:
        EdgePromptError: a score is NaN or infinite.
    """
    for step in head.steps:
        match step.operation:
            case "linear":
                states = states @ tensors[f"{step.name}.weight"].astype(np.float32, copy=False).T
                states = _add_bias(states, tensors.get(f"{step.name}.bias"))
            case "layer_norm":
                centred = states - states.mean(-1, keepdims=True)
                states = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(_EPSILON))
                states = _add_bias(states * tensors[f"{step.name}.weight"], tensors.get(f"{step.name}.bias"))
            case "tanh":
                states = np.tanh(states)
            case "relu":
                states = np.maximum(states, 0)
            case "silu":
                states = states * sigmoid(states)
            case "gelu":
                states = states * (0.5 * (1 + _erf(states * np.float32(0.5**0.5)))).astype(np.float32)
    return require_finite(states.astype(np.float32, copy=False))


def check_head(name: str, prompt: PromptFile, manifest: Manifest, *, has_pooler: bool = False) -> None:
    """Refuse a head that does not fit the base, the task or the labels.

    Raises:
        BaseMismatchError: the head reads what the base lacks, or does not fit its hidden size.
        InputError: it does not fit the prompt's task or labels.
    """
    head = prompt.head_spec
    assert head is not None
    if head.input == "pooler" and not has_pooler:
        raise BaseMismatchError(
            f"prompt {name!r} reads the pooled vector, and {manifest.base.name} has no trained pooler"
        )
    by_token = head.input.startswith("tokens")
    if by_token != (prompt.task in ("tag", "qa")):
        raise InputError(f"prompt {name!r} is for {prompt.task!r}, and its head reads {head.input!r}")
    check_head_sizes(name, prompt, manifest.geometry.hidden_size)


def check_head_sizes(name: str, prompt: PromptFile, hidden_size: int) -> None:
    """Refuse a head whose tensors do not compute together, or not from vectors of that size.

    Raises:
        BaseMismatchError: it does not fit.
        InputError: it gives another number of scores than there are labels.
    """
    head = prompt.head_spec
    assert head is not None
    try:
        shape = apply_head(head, prompt.head, np.zeros((1, hidden_size), np.float32)).shape
    except ValueError as error:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in prompt.head.items())
        raise BaseMismatchError(
            f"the head of prompt {name!r} does not fit hidden size {hidden_size}: {shapes}"
        ) from error
    wanted = 2 if prompt.task == "qa" else len(prompt.labels)
    if wanted and shape[1] != wanted:
        raise InputError(f"the head of prompt {name!r} gives {shape[1]} scores for {wanted} labels")


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    result: Floats = (0.5 * (1 + np.tanh(0.5 * x))).astype(np.float32)
    return result


def _add_bias(states: Floats, bias: Array | None) -> Floats:
    return states if bias is None else states + bias.astype(np.float32, copy=False)


def _erf(x: Floats) -> npt.NDArray[np.float64]:
    """The error function to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    size = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    found: npt.NDArray[np.float64] = np.sign(x) * (1 - series * np.exp(-(size**2)))
    return found
