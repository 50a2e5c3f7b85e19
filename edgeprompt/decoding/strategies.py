"""What requests do with logits, on decoders and encoder-decoders alike.

A strategy gets the logits behind its sequences, and says which tokens come next. At first it has one sequence, the
text. It may go on with several: an engine then computes them together on the text's keys and values, which are computed
once (`Strategy`). `edgeprompt.decoding.beam_search` is another strategy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import largest, log_softmax
from edgeprompt.decoding.detokenizer import Detokenizer, TextPiece
from edgeprompt.decoding.drafts import MOST, PromptLookup
from edgeprompt.decoding.processors import Processors
from edgeprompt.decoding.sampling import Sampler, Sampling
from edgeprompt.errors import InferenceError, InputError
from edgeprompt.package.tokenizer import naming
from edgeprompt.prompts.verbalizer import Node, Verbalizer, word_tree
from edgeprompt.request import Classification, Clock, Generation

Logits: TypeAlias = npt.NDArray[np.float32]
Move: TypeAlias = tuple[Sequence[int], Sequence[int] | None]
"""The next tokens, one for each sequence that goes on, and which of the last ones each continues; None: all of them
begin again behind the text."""
WORDS_AT_ONCE = 16
"""Most sequences of label words side by side: more of them win little time, and take memory."""


class Strategy(Protocol):
    """What a request makes of its logits."""

    least_width: int

    @property
    def width(self) -> int:
        """Most sequences that it takes at once."""

    @width.setter
    def width(self, most: int) -> None:
        """An engine may lower it before the first move, down to `least_width`."""

    @property
    def begins_again(self) -> bool:
        """Whether it may go back to the text after its first move."""

    def advance(self, logits: Logits) -> Move | None:
        """Take float32 [sequences, vocab_size] behind the last tokens (at first: behind the text); None when done.

        Raises:
            EdgePromptError: they are NaN or infinite.
        """

    def result(self) -> Any:
        """The answer, once done."""


class OneSequence:
    """What strategies with one sequence say of themselves."""

    width = least_width = 1
    begins_again = False


class ReadLogits(OneSequence):
    """Hands out the logits behind the text."""

    def __init__(self) -> None:
        self._logits: Logits | None = None

    def advance(self, logits: Logits) -> None:
        """Keep a copy; the buffer is the graph's."""
        largest(logits)
        self._logits = logits[0].copy()

    def result(self) -> Logits:
        """float32 [vocab_size]."""
        assert self._logits is not None
        return self._logits


class PrefixOnly(OneSequence):
    """Makes a prompt's prefix resident, and asks for no logits."""

    def advance(self, logits: Logits) -> None:
        """Never called: there is nothing to run."""

    def result(self) -> None:
        """Nothing."""


class ScoreWords:
    """Log-probabilities of label words.

    Words of one token need the logits behind the text alone. The others go on behind the text, in chunks and in the
    order of their tokens: one token deeper with every move, a sequence for each beginning that is not yet a whole word.
    A chunk takes `width` sequences at most, so a thousand words need no more memory than twenty.
    """

    least_width = 1

    def __init__(self, verbalizer: Verbalizer, clock: Clock) -> None:
        self._verbalizer, self._clock = verbalizer, clock
        self._scores = np.full(len(verbalizer.words), -np.inf)
        self._first: dict[int, float] | None = None
        """Log-probabilities of words' first tokens, once they are known."""
        self._chunk: list[int] = []
        """Words at hand."""
        self._open: list[tuple[Node, float]] = []
        """Where the sequences stand, and their log-probabilities."""
        self.width = WORDS_AT_ONCE

    @property
    def width(self) -> int:
        """Most sequences that it takes at once."""
        return self._width

    @width.setter
    def width(self, most: int) -> None:
        self._left, widest = _chunks(self._verbalizer.words, most)
        self._width, self._several = max(1, widest), len(self._left) > 1

    @property
    def begins_again(self) -> bool:
        """Whether the words take more than one chunk."""
        return self._several

    def advance(self, logits: Logits) -> Move | None:
        """Score the next tokens of the words at hand; the words behind them come next, or the next chunk."""
        chances = log_softmax(logits)
        if self._first is None:
            self._first = {word[0]: float(chances[0, word[0]]) for word in self._verbalizer.words}
            for index, word in enumerate(self._verbalizer.words):
                if len(word) == 1:
                    self._scores[index] = self._first[word[0]]
            return self._next_chunk()
        tokens, parents, opened = list[int](), list[int](), list[tuple[Node, float]]()
        for row, (node, before) in enumerate(self._open):
            for token, child in node.children.items():
                logprob = before + float(chances[row, token])
                self._scores[[self._chunk[word] for word in child.words]] = logprob
                if child.children:
                    tokens.append(token)
                    parents.append(row)
                    opened.append((child, logprob))
        self._open = opened
        return (tokens, parents) if tokens else self._next_chunk()

    def _next_chunk(self) -> Move | None:
        assert self._first is not None
        if not self._left:
            self._clock.tick()
            return None
        self._chunk = self._left.pop(0)
        tree = word_tree([self._verbalizer.words[index] for index in self._chunk])
        self._open = [(child, self._first[token]) for token, child in tree.children.items()]
        return list(tree.children), None

    def result(self) -> Classification:
        """The decision."""
        return replace(self._verbalizer.classification(self._scores), timings=self._clock.timings(1))


def _chunks(words: Sequence[Sequence[int]], width: int) -> tuple[list[list[int]], int]:
    """Words of several tokens, by index, so that a chunk's tree has `width` inner nodes at most at every depth.

    Returns:
        The chunks, and the most that one of them has.
    """
    chunks, widest, seen, depths = list[list[int]](), 0, set[tuple[int, ...]](), Counter[int]()
    order = sorted(range(len(words)), key=lambda index: tuple(words[index]))
    for index in (index for index in order if len(words[index]) > 1):
        inner = [tuple(words[index][:depth]) for depth in range(1, len(words[index]))]
        fits = all(depths[len(node)] < width for node in inner if node not in seen)
        if not chunks or not fits:
            chunks.append([])
            seen, depths = set(), Counter()
        chunks[-1].append(index)
        depths.update(len(node) for node in inner if node not in seen)
        seen.update(inner)
        widest = max(widest, *depths.values())
    return chunks, widest


class Generate(OneSequence):
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
        lookup: PromptLookup | None = None,
    ) -> None:
        self._lookup = lookup
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

    def advance(self, logits: Logits) -> Move | None:
        """Choose the next token and say whether to go on."""
        token = self._choose(logits[0])
        return None if token is None else ((token,), (0,))

    def drafts(self) -> tuple[Sequence[int], float]:
        """Tokens that may follow the last one, and the share of them that is expected to be right."""
        if self._choice is None:
            return self._lookup.draft(self._ids) if self._lookup is not None else ((), 0.0)
        forced, node = list[int](), self._choice
        while len(node.children) == 1 and not node.words:
            ((token, node),) = node.children.items()
            forced.append(token)
        return forced[:MOST], 1.0

    def _choose(self, logits: Logits) -> int | None:
        """The next token to run, or None at the end."""
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
            try:
                self._on_text(piece)
            except Exception:
                raise
            except BaseException as error:  # SystemExit and such would end the thread that serves all requests
                raise InferenceError(f"on_text raised {error!r}") from error

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
    choices = []
    for text in sampling.choices:
        with naming(f"choice {text!r}"):
            choices.append(encode(text))
    longest = max(len(ids) for ids in choices)
    if longest > sampling.max_new_tokens:
        raise InputError(
            f"the longest of the choices has {longest} tokens, and max_new_tokens is {sampling.max_new_tokens}; "
            "raise it, or shorten the choice"
        )
    return word_tree(choices)
