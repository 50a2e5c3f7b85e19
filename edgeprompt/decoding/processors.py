"""What a base's generation_config says of every answer, done to the logits as transformers' logits processors do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import InputError
from edgeprompt.package.generation import FIELDS, check_generation

Scores = npt.NDArray[np.float32]


def generation_fields(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `package.generation`, a later layer's before an earlier one's.

    Raises:
        InputError: a value is of another type or range.
    """
    merged = {name: value for layer in layers for name, value in layer.items() if name in FIELDS and value is not None}
    try:
        return check_generation(merged)
    except ValueError as error:
        raise InputError(str(error)) from error


class Processors:
    """Changes one sequence's scores before a token is chosen; the repetition penalty is the sampler's or `penalise`'s.

    Args:
        fields: as `generation_fields` gives them.
        history: ids in front of the answer.
        eos: end tokens.
        max_new_tokens: where `forced_eos_token_id` comes.
    """

    def __init__(
        self, fields: Mapping[str, Any], history: Sequence[int], eos: Sequence[int], max_new_tokens: int
    ) -> None:
        self._history, self._eos, self._max = list(history), sorted(eos), max_new_tokens
        self._ngram = fields.get("no_repeat_ngram_size", 0)
        # A bad word that is an end token alone is no bad word, as in transformers.
        self._bad = [word for word in fields.get("bad_words_ids", ()) if word not in ([token] for token in eos)]
        self._least = max(
            fields.get("min_length", 0) - len(self._history), fields.get("min_new_tokens", 0) if self._eos else 0
        )
        self._first = fields.get("forced_bos_token_id") if len(self._history) == 1 else None
        self._last = list(fields.get("forced_eos_token_id", ()))
        self._never = list(fields.get("suppress_tokens", ()))
        self._not_first = list(fields.get("begin_suppress_tokens", ()))
        self._begin = 1 if len(self._history) <= 1 and fields.get("forced_bos_token_id") is not None else 0
        self._penalty = fields.get("repetition_penalty", 1.0)
        self.active = bool(
            self._ngram
            or self._bad
            or self._least > 0
            or self._first is not None
            or self._last
            or self._never
            or self._not_first
        )
        """Whether anything is ever changed by `__call__`."""

    def __call__(self, scores: Scores, answer: Sequence[int], *, penalise: bool = False) -> Scores:
        """Scores `[vocab_size]` behind `answer`, changed in a copy; `penalise` applies the repetition penalty too."""
        if not (self.active or (penalise and self._penalty != 1)):
            return scores
        scores = scores.copy()
        ids = [*self._history, *answer]
        if penalise and self._penalty != 1:
            seen = np.unique([token for token in ids if token < scores.size])
            values, penalty = scores[seen], np.float32(self._penalty)
            scores[seen] = np.where(values > 0, values / penalty, values * penalty)
        self._ban(scores, self._repeats(ids))
        self._ban(scores, [word[-1] for word in self._bad if ids[len(ids) - len(word) + 1 :] == word[:-1]])
        if len(answer) < self._least:
            self._ban(scores, self._eos)
        if self._first is not None and not answer:
            self._force(scores, [self._first])
        if self._last and len(answer) == self._max - 1:
            self._force(scores, self._last)
        self._ban(scores, self._never)
        if len(answer) == self._begin:
            self._ban(scores, self._not_first)
        return scores

    def _repeats(self, ids: list[int]) -> list[int]:
        """Tokens that would complete an n-gram that is there."""
        size = self._ngram
        if not size or len(ids) < size:
            return []
        end = ids[len(ids) - size + 1 :]
        return [ids[at + size - 1] for at in range(len(ids) - size + 1) if ids[at : at + size - 1] == end]

    @staticmethod
    def _ban(scores: Scores, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token < scores.size:
                scores[token] = -np.inf

    @staticmethod
    def _force(scores: Scores, tokens: Sequence[int]) -> None:
        beyond = [token for token in tokens if token >= scores.size]
        if beyond:
            raise InputError(f"forced token {beyond[0]} is none of the base's {scores.size}; mend `generation`")
        scores[:] = -np.inf
        scores[list(tokens)] = 0.0
