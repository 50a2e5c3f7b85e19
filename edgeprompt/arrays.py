"""Softmax and its logarithm in numpy, with the one check that what they rest on is finite."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import EdgePromptError

Floating = TypeVar("Floating", bound=np.floating[Any])


def largest(logits: npt.NDArray[Floating]) -> npt.NDArray[Floating]:
    """The largest over the last axis, which stays.

    Raises:
        EdgePromptError: it is NaN or infinite; an answer that rests on it would look like one. Single values may be
            minus infinity: tokens that are ruled out.
    """
    top: npt.NDArray[Floating] = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise EdgePromptError(
            "the model's logits are NaN or infinite, so there is no answer: the prompt's values are too large for this "
            "graph, or the graph is broken (run edgeprompt validate)"
        )
    return top


def require_finite(values: npt.NDArray[Floating]) -> npt.NDArray[Floating]:
    """The values, all of them finite.

    Raises:
        EdgePromptError: one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise EdgePromptError(
            "the model's states are NaN or infinite, so there is no answer: the prompt's values are too large for this "
            "graph, or the graph is broken (run edgeprompt validate)"
        )
    return values


def log_softmax(logits: npt.NDArray[Floating]) -> npt.NDArray[Floating]:
    """Log-probabilities over the last axis, in the type of `logits`.

    Raises:
        EdgePromptError: the logits are NaN or infinite.
    """
    shifted: npt.NDArray[Floating] = logits - largest(logits)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(shifted.dtype)
    return shifted


def softmax(logits: npt.NDArray[Floating]) -> npt.NDArray[Floating]:
    """Probabilities over the last axis, in the type of `logits`.

    Raises:
        EdgePromptError: the logits are NaN or infinite.
    """
    weights = np.exp(logits - largest(logits))
    found: npt.NDArray[Floating] = weights / weights.sum(axis=-1, keepdims=True)
    return found
