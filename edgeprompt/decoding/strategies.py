"""What requests do with logits: generate, answer with one of some texts, score label words, or hand the logits out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import largest, log_softmax
from edgeprompt.decoding.detokenizer import Detokenizer, TextPiece
from edgeprompt.decoding.processors import Processors
from edgeprompt.decoding.sampling import Sampler, Sampling
from edgeprompt.errors import InputError
from edgeprompt.prompts.verbalizer import Node, Verbalizer, word_tree
from edgeprompt.request import Classification, Generation, Timings

Logits = npt.NDArray[np.float32]


class Clock:
    """Times of one request, from the moment it was made."""

    def __init__(self, input_tokens: int = 0) -> None:
        self.start = time.perf_counter()
        self.first = 0.0
        self.input_tokens = input_tokens

    def tick(self) -> None:
        """A token is there."""
        self.first = self.first or time.perf_counter()

    def timings(self, new_tokens: int) -> Timings:
        """What has passed until now."""
        now = time.perf_counter()
        return Timings((self.first or now) - self.start, now - self.start, self.input_tokens, new_tokens)


class LogitsWork:
    """Hands out the logits behind the text."""

    def __init__(self) -> None:
        self.length = 0
        self._logits: Logits | None = None

    def advance(self, logits: Logits) -> None:
        """Keep a copy; the buffer is the graph's.

        Raises:
            EdgePromptError: they are NaN or infinite.
        """
        largest(logits)
        self._logits = logits.copy()

    def result(self) -> Logits:
        """float32 [vocab_size]."""
        assert self._logits is not None
        return self._logits


class PrefixWork:
    """Makes a prompt's prefix resident, and asks for no logits."""

    def __init__(self) -> None:
        self.length = 0

    def advance(self, logits: Logits) -> None:
        """Never called: there is nothing to run."""

    def result(self) -> None:
        """Nothing."""


class ScoreWork:
    """Log-probabilities of label words, walking the tree of their tokens depth first.

    Words of one token need the prefill's logits alone. For the others a step runs a word's token and goes back to
    where the word branched off; what is left behind in the cache is overwritten.
    """

    def __init__(self, verbalizer: Verbalizer, clock: Clock) -> None:
        self.length = 0
        self._verbalizer, self._clock = verbalizer, clock
        self._found = np.full(len(verbalizer.words), -np.inf)
        self._here: tuple[Node, float] = (word_tree(verbalizer.words), 0.0)
        self._todo: list[tuple[int, int, float, Node]] = []

    def advance(self, logits: Logits) -> int | None:
        """Score the children of the node at hand, then go to the next node that has children."""
        node, before = self._here
        chances = log_softmax(logits)
        for token, child in node.children.items():
            logprob = before + float(chances[token])
            for word in child.words:
                self._found[word] = logprob
            if child.children:
                self._todo.append((self.length, token, logprob, child))
        if not self._todo:
            self._clock.tick()
            return None
        self.length, token, logprob, child = self._todo.pop()
        self._here = (child, logprob)
        return token

    def result(self) -> Classification:
        """The decision."""
        return replace(self._verbalizer.classification(self._found), timings=self._clock.timings(1))


class GenerateWork:
    """Generates until an end token, a stop string, the length, or the end of a choice."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        eos: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], Sequence[int]],
        history: Sequence[int],
        clock: Clock,
        on_text: Callable[[str], None] | None = None,
        processors: Processors | None = None,
    ) -> None:
        self.length = 0
        self._sampling, self._eos, self._decode, self._clock = sampling, frozenset(eos), decode, clock
        self._sampler = Sampler(sampling, history)
        self._processors = processors if processors is not None and processors.active and not sampling.choices else None
        self._on_text = on_text
        self._text = Detokenizer(decode, sampling.stop) if on_text or sampling.stop else None
        self._choice = _choice_tree(sampling, encode) if sampling.choices else None
        self._limit = sampling.max_new_tokens
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._said = 0
        """Tokens whose log-probabilities went out with a piece of text."""
        self._reason = ""

    def advance(self, logits: Logits) -> int | None:
        """Choose the next token and say whether to go on."""
        allowed = None
        if self._choice is not None:
            allowed = [*self._choice.children, *(self._eos if self._choice.words else ())]
        scores = logits
        if self._processors is not None:
            largest(logits)
            scores = self._processors(logits, self._ids)
        token = self._sampler(scores, allowed)
        self._clock.tick()
        if token in self._eos and (self._choice is None or token not in self._choice.children):
            return self._end("stop" if self._choice else "eos")
        self._ids.append(token)
        if self._sampling.logprobs:
            chances = log_softmax(logits)
            self._logprobs.append(float(chances[token]))
            if self._sampling.top_logprobs:
                self._top.append(_most_likely(chances, self._sampling.top_logprobs))
        if self._text is not None:
            self._say(self._text.add(token))
            if self._text.stopped:
                return self._end("stop")
        if self._choice is not None:
            self._choice = self._choice.children[token]
            if not self._choice.children:
                return self._end("stop")
        elif len(self._ids) >= self._limit:
            return self._end("length")
        return token

    def _say(self, piece: str) -> None:
        if piece and self._on_text is not None:
            if self._sampling.logprobs:
                new = slice(self._said, len(self._ids))
                piece = TextPiece(piece, self._ids[new], self._logprobs[new], self._top[new])
                self._said = len(self._ids)
            self._on_text(piece)

    def _end(self, reason: str) -> int | None:
        self._reason = reason
        if self._text is not None:
            self._say(self._text.finish())
        return None

    def result(self) -> Generation:
        """The text and its tokens, without the end token."""
        return Generation(
            text=self._decode(self._ids) if self._text is None else self._text.text,
            token_ids=tuple(self._ids),
            finish_reason=self._reason,
            timings=self._clock.timings(len(self._ids)),
            logprobs=tuple(self._logprobs),
            top_logprobs=tuple(self._top),
        )


def _most_likely(chances: npt.NDArray[np.floating[Any]], count: int) -> tuple[tuple[int, float], ...]:
    """The largest of [vocab_size] log-probabilities as (token, log-probability), falling."""
    count = min(count, chances.size)
    found = np.argpartition(chances, chances.size - count)[chances.size - count :]
    found = found[np.lexsort((found, -chances[found]))]
    return tuple((int(token), float(chances[token])) for token in found)


def _choice_tree(sampling: Sampling, encode: Callable[[str], Sequence[int]]) -> Node:
    """The tree of the choices' tokens.

    Raises:
        InputError: a choice is longer than `max_new_tokens`, for which room in the cache was reserved.
    """
    choices = [encode(text) for text in sampling.choices]
    longest = max(len(ids) for ids in choices)
    if longest > sampling.max_new_tokens:
        raise InputError(
            f"the longest of the choices has {longest} tokens, and max_new_tokens is {sampling.max_new_tokens}; "
            "raise it, or shorten the choice"
        )
    return word_tree(choices)
