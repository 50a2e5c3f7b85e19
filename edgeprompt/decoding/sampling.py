"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, choices.

Every request has its own random generator and draws one number per token, so the same seed gives the same text
whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import largest
from edgeprompt.errors import InputError
from edgeprompt.request import GenerationOptions

DEFAULT_NEW_TOKENS = 64
LEAST_TEMPERATURE = 1e-30
"""Lower ones would divide beyond float32; here the largest logit has taken all of the probability long ago."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """Generation options with all defaults filled in and checked."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    asked_length: bool = False
    """Whether somebody named `max_new_tokens`; a default one may shrink to what the context has left."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    choices: tuple[str, ...] = ()


_LIMITS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "max_new_tokens": (int, 1, 1 << 31),
    "temperature": (float, 0, 100),
    "top_k": (int, 0, 1 << 31),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "seed": (int, 0, (1 << 64) - 1),
    "top_logprobs": (int, 0, 100),
}


def resolve(options: GenerationOptions, defaults: Mapping[str, Any]) -> Sampling:
    """Fill what `options` leaves open from the prompt file's `defaults`, then from the library's.

    Raises:
        InputError: a value is of a wrong type or out of range.
    """
    values: dict[str, Any] = {}
    for name, (kind, low, high) in _LIMITS.items():
        value = getattr(options, name)
        value = defaults.get(name) if value is None else value
        if value is None:
            continue
        allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        if not isinstance(value, allowed) or isinstance(value, bool) or not low <= value <= high:
            kind_name = "an integer" if kind is int else "a number"
            raise InputError(f"{name} is {value!r}; it must be {kind_name} between {low:g} and {high:g}")
        values[name] = kind(value)
    if values.get("top_p") == 0:
        raise InputError("top_p is 0; it must be above 0 (1 keeps every token)")
    choices = None if options.choices is None else _texts("choices", options.choices)
    if choices == ():
        raise InputError("choices is empty, so there is nothing to answer; give at least one, or leave it out")
    stop = options.stop or defaults.get("stop", ())
    return Sampling(
        **values,
        asked_length="max_new_tokens" in values,
        stop=_texts("stop", (stop,) if isinstance(stop, str) else stop),
        logprobs=options.logprobs or values.get("top_logprobs", 0) > 0,
        choices=choices or (),
    )


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is {value!r}; it must be a list of texts")
    for text in value:
        if not isinstance(text, str) or not text:
            raise InputError(f"{name} takes texts of at least one character, found {text!r}")
    return tuple(value)


class Sampler:
    """Chooses the next token of one request."""

    def __init__(self, sampling: Sampling, history: Sequence[int] = ()) -> None:
        """`history`: ids that the repetition penalty counts from the start (the text's, as transformers does)."""
        self._options = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed)) if sampling.temperature > 0 else None
        self._seen = set(history) if sampling.repetition_penalty != 1 else None
        self._plain = sampling.temperature == 0 and self._seen is None

    def __call__(self, logits: Logits, allowed: Sequence[int] | None = None) -> int:
        """Id of the next token; with `allowed`, one of those ids. `logits` [vocab_size] is not changed.

        Raises:
            EdgePromptError: the logits are NaN or infinite.
        """
        if self._plain and allowed is None:
            return _argmax(logits)
        if self._seen is not None:
            logits = self._penalised(logits)
        if allowed is not None:
            ids = np.asarray(allowed, np.int64)
            return int(ids[self._choose(logits[ids])])
        token = self._choose(logits)
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _penalised(self, logits: Logits) -> Logits:
        """Keskar et al. 2019 (CTRL): divide positive logits of seen tokens, multiply negative ones."""
        assert self._seen is not None
        ids = np.fromiter(self._seen, np.int64, len(self._seen))
        ids = ids[ids < logits.size]
        logits = logits.copy()
        seen, penalty = logits[ids], np.float32(self._options.repetition_penalty)
        logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        return logits

    def _choose(self, logits: Logits) -> int:
        if self._random is None:
            return _argmax(logits)
        options = self._options
        falls = logits.astype(np.float32, copy=False) - largest(logits)
        weights = np.exp(falls / np.float32(max(options.temperature, LEAST_TEMPERATURE)))
        count = min(options.top_k, weights.size) if options.top_k else weights.size
        order = _largest(weights, count, options)
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        keep = len(order)
        if options.top_p < 1:
            total = cumulative[-1] if options.top_k else float(weights.sum(dtype=np.float64))
            keep = int(np.searchsorted(cumulative, options.top_p * total)) + 1
        if options.min_p > 0:
            keep = min(keep, int((weights[order] >= options.min_p).sum()))
        cumulative = cumulative[: max(1, keep)]  # `keep` may be one too many, where sums round differently
        place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], "right")
        return int(order[min(place, len(cumulative) - 1)])


def _argmax(logits: Logits) -> int:
    found = int(logits.argmax())  # the first NaN, where there is one
    if not np.isfinite(logits[found]):
        largest(logits)
    return found


def _largest(weights: Logits, count: int, options: Sampling) -> npt.NDArray[np.intp]:
    """Indices in falling order: the `count` largest, or as many as top-p and min-p can reach (a full sort is slow)."""
    if options.top_k == 0 and options.top_p == 1 and options.min_p == 0:
        return np.arange(weights.size)
    total = float(weights.sum(dtype=np.float64)) if options.top_p < 1 and not options.top_k else 0.0
    size = count if options.top_k else min(256, count)
    while True:
        order = np.argpartition(weights, weights.size - size)[weights.size - size :]
        order = order[np.lexsort((order, -weights[order]))]
        if size == count:
            return order
        reached = options.top_p < 1 and weights[order].sum(dtype=np.float64) >= options.top_p * total
        if reached or (options.min_p > 0 and weights[order[-1]] < options.min_p):
            return order
        size = min(size * 8, count)
