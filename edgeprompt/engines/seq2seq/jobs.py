"""What one request does with the decoder's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import log_softmax
from edgeprompt.decoding.beam_search import BeamSearch
from edgeprompt.decoding.strategies import Clock, GenerateWork, LogitsWork
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.verbalizer import Node, Verbalizer, word_tree
from edgeprompt.request import Classification, Generation

Logits: TypeAlias = npt.NDArray[np.float32]
Move: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""The next tokens, and for each the row of the job that it continues."""


class Decision(Protocol):
    """What a request makes of its logits."""

    def advance(self, logits: Logits) -> Move | None:
        """Take `[rows, vocab_size]` behind the last tokens; the next tokens to run, or None when done."""

    def result(self) -> Any:
        """The answer, once done."""


class OneRow:
    """Text generation (`GenerateWork`) or the first logits (`LogitsWork`): one row all along."""

    def __init__(self, work: GenerateWork | LogitsWork) -> None:
        self._work = work

    def advance(self, logits: Logits) -> Move | None:
        """Choose one token."""
        row = logits[0]
        if isinstance(self._work, LogitsWork):
            self._work.advance(row)
            return None
        token = self._work.advance(row)
        return None if token is None else ([token], [0])

    def result(self) -> Any:
        """The work's."""
        return self._work.result()


class WordScores:
    """Scores label words of one or more tokens; words that share a beginning share its rows."""

    def __init__(self, verbalizer: Verbalizer, clock: Clock) -> None:
        self._verbalizer, self._clock = verbalizer, clock
        self._found = np.full(len(verbalizer.words), -np.inf)
        self._open: list[tuple[Node, float]] = [(word_tree(verbalizer.words), 0.0)]

    def advance(self, logits: Logits) -> Move | None:
        """Go one token deeper into the tree of words, a row for each node that has children."""
        chances = log_softmax(logits)
        tokens, parents, opened = [], [], []
        for row, (node, before) in enumerate(self._open):
            for token, child in node.children.items():
                logprob = before + float(chances[row, token])
                self._found[child.words] = logprob
                if child.children:
                    tokens.append(token)
                    parents.append(row)
                    opened.append((child, logprob))
        self._open = opened
        self._clock.tick()
        return (tokens, parents) if tokens else None

    def result(self) -> Classification:
        """The decision."""
        return replace(self._verbalizer.classification(self._found), timings=self._clock.timings(1))


class Beams:
    """Beam search, a row for each running beam."""

    def __init__(self, search: BeamSearch, eos: Sequence[int], tokenizer: Tokenizer, clock: Clock) -> None:
        self._search, self._eos = search, frozenset(eos)
        self._tokenizer, self._clock = tokenizer, clock

    def advance(self, logits: Logits) -> Move | None:
        """Move all beams on."""
        move = self._search.advance(logits)
        self._clock.tick()
        return None if move is None else (move[0].tolist(), move[1].tolist())

    def result(self) -> Generation:
        """The best hypothesis, without its end token."""
        tokens = self._search.best
        ended = bool(tokens) and tokens[-1] in self._eos
        tokens = tokens[:-1] if ended else tokens
        return Generation(
            text=self._tokenizer.decode(tokens),
            token_ids=tuple(tokens),
            finish_reason="eos" if ended else "length",
            timings=self._clock.timings(len(tokens)),
        )
