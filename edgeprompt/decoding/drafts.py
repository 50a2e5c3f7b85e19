"""Drafts from the text (prompt lookup decoding, Saxena 2023): tokens that may come next, read where the text said it.

An answer that copies, restores or quotes repeats its text. What stood behind the last tokens where they stood before is
a draft of what comes now, and one step of several positions checks it. A wrong draft costs time and changes nothing:
every token is still chosen from its own logits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

USUAL = {2: 1.0, 4: 1.35, 8: 2.0}
"""Positions of a step that checks a draft, and about what it takes. Kernels take rows in groups, so what lies between
costs as much."""
USUAL_INT8 = {2: 1.1, 4: 1.0, 8: 1.2}
"""The same at int8."""
MOST = max(USUAL) - 1
"""Most tokens of a draft."""
FILLED = 4
"""Most positions that a step without drafts is filled up to."""
_LONG, _SHORT = 3, 2
"""Tokens of an exact match."""
_SUFFIXES = (24, 12, 6, 4, 3)
"""Letters of a match by text, the longest first."""
_TRUSTED = 12
"""Letters from which on a match by text is as good as an exact one."""
_MEMORY = 0.85
"""How much of what is known of a kind of match is left after each token."""
_SAMPLES = 9
_LEAST_SAMPLES = 3
_LOOK_AGAIN = 64
"""Steps after which a width that was not used is measured again."""


class PromptLookup:
    """Reads drafts out of one request's text and what was generated."""

    def __init__(self, history: Sequence[int], letters: Callable[[Sequence[int]], Sequence[str]]) -> None:
        """Prepare; nothing is computed before the first draft.

        Args:
            history: ids of the text.
            letters: of each of some tokens, its letters and digits in lower case.
        """
        self._history, self._letters = history, letters
        self._ids: list[int] = []
        self._text = ""
        """Letters of all ids."""
        self._starts: list[int] = []
        """Where each token's letters begin."""
        self._exact: dict[tuple[int, ...], int] = {}
        """Where the token behind an n-gram stands, of the last occurrence but the one at the end."""
        self._expected: deque[int] = deque()
        self._trusted = False
        # As if a few tokens had been seen: of matches that are trusted most were right.
        self._hits, self._tries = {True: 1.6, False: 0.8}, {True: 2.0, False: 2.0}

    def draft(self, answer: Sequence[int], most: int = MOST) -> tuple[list[int], float]:
        """Tokens that may follow the text and `answer`, and the share of such drafts that were right so far."""
        if not self._ids:
            self._add(self._history)
        else:
            for token in answer[len(self._ids) - len(self._history) :]:
                self._observe(token)
        self._add(answer[len(self._ids) - len(self._history) :])
        found = self._find()
        self._expected = deque(self._ids[found : found + most]) if found is not None else deque()
        return list(self._expected), self._hits[self._trusted] / self._tries[self._trusted]

    def _observe(self, token: int) -> None:
        """Compare a token with the draft, whether or not it was checked."""
        if not self._expected:
            return
        right = token == self._expected.popleft()
        self._hits[self._trusted] = _MEMORY * self._hits[self._trusted] + right
        self._tries[self._trusted] = _MEMORY * self._tries[self._trusted] + 1
        if not right:
            self._expected.clear()

    def _add(self, ids: Sequence[int]) -> None:
        for token, letters in zip(ids, self._letters(ids), strict=True):
            end = len(self._ids)
            for size in (_SHORT, _LONG):  # those at the end: what stands behind them is this token
                if end >= size:
                    self._exact[tuple(self._ids[end - size :])] = end
            self._ids.append(token)
            self._starts.append(len(self._text))
            self._text += letters

    def _find(self) -> int | None:
        """Where in `_ids` a draft begins."""
        exact = self._exact.get(tuple(self._ids[-_LONG:]))
        if exact is None:
            found = self._find_text()
            if found is not None:
                return found
            exact = self._exact.get(tuple(self._ids[-_SHORT:]))
            self._trusted = False
            return exact
        self._trusted = True
        return exact

    def _find_text(self) -> int | None:
        """The same by letters alone: other case, other punctuation, other tokens."""
        end = len(self._text)
        for size in _SUFFIXES:
            if size >= end:
                continue
            place = self._text.rfind(self._text[end - size :], 0, end - 1)
            if place < 0:
                continue
            token = bisect_left(self._starts, place + size)
            if token < len(self._ids) and self._starts[token] != place + size:
                continue  # the match ends inside a token
            if self._starts[-1] == end:  # punctuation was generated already: the text's own is not repeated
                while token < len(self._ids) and self._is_bare(token):
                    token += 1
            if token < len(self._ids):
                self._trusted = size >= _TRUSTED
                return token
        return None

    def _is_bare(self, token: int) -> bool:
        """Whether a token has no letters."""
        after = self._starts[token + 1] if token + 1 < len(self._starts) else len(self._text)
        return after == self._starts[token]


class StepCosts:
    """What steps of several positions take on this device, measured as they are run, and which width pays.

    Until a width has been run, its cost is what `usual` says, relative to the others.
    """

    def __init__(self, usual: Mapping[int, float]) -> None:
        """`usual`: by the positions of a step."""
        self._usual = dict(usual)
        self._seconds: dict[int, deque[float]] = {width: deque(maxlen=_SAMPLES) for width in usual}
        self._last = dict.fromkeys(usual, 0)
        self._steps = 0

    def add(self, width: int, seconds: float) -> None:
        """A step was run."""
        self._steps += 1
        self._last[width] = self._steps
        self._seconds[width].append(seconds)

    def cost(self, width: int) -> float:
        """Of a step, measured or guessed."""
        if self._seconds[width]:
            return _middle(self._seconds[width])
        known = [other for other, seconds in self._seconds.items() if seconds]
        if not known:
            return self._usual[width]
        near = min(known, key=lambda other: abs(other - width))
        return _middle(self._seconds[near]) * self._usual[width] / self._usual[near]

    def choose(self, drafted: int, right: float, most: int) -> int:
        """Positions of the next step.

        Args:
            drafted: tokens of the draft.
            right: the share of its tokens that is expected to be right.
            most: positions that there is room for, at least two.
        """
        allowed = [width for width in self._usual if width <= most]
        # All widths compute the same, so those that a step without a draft may have are measured at first and now and
        # then, and the quickest of them is taken.
        for width in [width for width in allowed if width <= FILLED]:
            if len(self._seconds[width]) < _LEAST_SAMPLES or self._steps - self._last[width] > _LOOK_AGAIN:
                return width

        def gain(width: int) -> float:
            checked = min(width - 1, drafted)
            return sum(right**place for place in range(checked + 1)) / self.cost(width)

        return max(allowed, key=gain)


def _middle(seconds: Collection[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]  # the module statistics takes longer to import than a first label may
