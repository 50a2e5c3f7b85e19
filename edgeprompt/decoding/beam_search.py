"""Beam search over one request, step for step as transformers does it (`GenerationMixin._beam_search`, 5.x)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import log_softmax
from edgeprompt.decoding.processors import Processors
from edgeprompt.decoding.strategies import Move
from edgeprompt.request import Clock, Generation

_NEVER = -1e9


class BeamSearch:
    """Keeps the best `num_beams` continuations, a sequence each (`edgeprompt.decoding.strategies.Strategy`).

    Finished hypotheses are ranked by `sum of log-probabilities / length ** length_penalty`, the end token counted in
    the length and the decoder's own start tokens not.
    """

    begins_again = False

    def __init__(
        self,
        num_beams: int,
        max_new_tokens: int,
        eos: Sequence[int],
        *,
        decode: Callable[[Sequence[int]], str],
        clock: Clock,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        processors: Processors | None = None,
    ) -> None:
        self.width = self.least_width = self._num_beams = num_beams
        self._decode, self._clock = decode, clock
        self._max = max_new_tokens
        self._eos = frozenset(eos)
        self._keep = max(2, 1 + len(self._eos)) * num_beams
        self._penalty = length_penalty
        self._early = early_stopping
        self._processors = processors
        self._scores = np.zeros(1, np.float32)
        self._running: list[list[int]] = [[]]
        self._finished: list[tuple[float, list[int]]] = []
        self._improvable = True

    @property
    def best(self) -> list[int]:
        """Tokens of the best hypothesis, its end token included."""
        return self._finished[0][1] if self._finished else self._running[0]

    def advance(self, logits: npt.NDArray[np.float32]) -> Move | None:
        """Move all beams on; None when the search is over.

        Raises:
            EdgePromptError: the logits are NaN or infinite.
        """
        logarithms = log_softmax(logits)
        if self._processors is not None:  # of log-probabilities, which are not normalised again
            beams = zip(logarithms, self._running, strict=True)
            logarithms = np.stack([self._processors(row, beam, penalise=True) for row, beam in beams])
        logarithms = logarithms + self._scores[:, None]
        vocab = logits.shape[1]
        flat = logarithms.ravel()
        keep = min(self._keep, flat.size)
        top = np.argpartition(-flat, keep - 1)[:keep]
        top = top[np.argsort(-flat[top], kind="stable")]
        scores, parents, tokens = flat[top], top // vocab, top % vocab
        sequences = [[*self._running[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
        length = len(sequences[0])
        ended = np.array([token in self._eos or length >= self._max for token in tokens])
        self._finish(sequences, scores, ended, length)
        best = np.argsort(-(scores + np.where(ended, np.float32(_NEVER), 0)), kind="stable")[: self._num_beams]
        self._running = [sequences[index] for index in best]
        self._scores = (scores + np.where(ended, np.float32(_NEVER), 0))[best].astype(np.float32)
        self._clock.tick()
        self._improvable = self._improvable and self._can_improve(length)
        full = len(self._finished) == self._num_beams
        if not self._improvable or (full and self._early is True) or ended.all():
            return None
        return tokens[best].tolist(), parents[best].tolist()

    def result(self) -> Generation:
        """The best hypothesis, without its end token."""
        tokens = self.best
        ended = bool(tokens) and tokens[-1] in self._eos
        tokens = tokens[:-1] if ended else tokens
        return Generation(
            text=self._decode(tokens),
            token_ids=tuple(tokens),
            finish_reason="eos" if ended else "length",
            timings=self._clock.timings(len(tokens)),
        )

    def _finish(
        self, sequences: list[list[int]], scores: npt.NDArray[np.float32], ended: npt.NDArray[np.bool_], length: int
    ) -> None:
        """Take what ended among the best `num_beams`, and keep the best `num_beams` of all that ever ended."""
        if not self._improvable or (self._early is True and len(self._finished) == self._num_beams):
            return
        for index in range(min(self._num_beams, len(sequences))):
            if ended[index]:
                self._finished.append((float(scores[index] / np.float32(length**self._penalty)), sequences[index]))
        self._finished.sort(key=lambda found: -found[0])
        del self._finished[self._num_beams :]

    def _can_improve(self, length: int) -> bool:
        if len(self._finished) < self._num_beams:
            return True
        reachable = self._max if self._early == "never" and self._penalty > 0 else length
        return bool(float(self._scores[0]) / reachable**self._penalty > self._finished[-1][0])
