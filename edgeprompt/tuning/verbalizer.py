"""Scores of label words in PyTorch: the formula of `edgeprompt.prompts.verbalizer`, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from edgeprompt.prompts.verbalizer import Verbalizer

_LEAST_ROWS, _PADDING = 128, 1.5
"""From so many rows on, a part ends where the next stem is longer by this factor than its first."""


class LabelWords:
    """Which rows and positions a batch must compute to score the label words, and the scores from their logits.

    A word of several tokens needs the text continued by the word's first tokens (a "stem"); words with the same
    beginning share the row.
    """

    def __init__(self, verbalizer: Verbalizer) -> None:
        """`verbalizer`: labels and the token ids of their words."""
        words = verbalizer.words
        starts = {word[:-1] for word in words}
        shorter = {start[:length] for start in starts for length in range(len(start))}
        # By length, so that rows computed together need little padding.
        self.stems: list[tuple[int, ...]] = sorted(starts - shorter, key=lambda stem: (len(stem), stem))
        self.longest = max(map(len, self.stems))
        self.num_labels = len(verbalizer.labels)
        places = [0]
        for stem in self.stems:
            places.append(places[-1] + len(stem) + 1)
        self.num_positions = places[-1]
        self._places = places
        self._stem = torch.zeros(len(words), dtype=torch.long)
        longest = max(len(word) for word in words)
        self._position = torch.zeros(len(words), longest, dtype=torch.long)
        self._token = torch.zeros(len(words), longest, dtype=torch.long)
        self._present = torch.zeros(len(words), longest, dtype=torch.bool)
        self._owner = torch.tensor(verbalizer.owner)
        self._aggregation = verbalizer.aggregation
        rows: dict[tuple[int, ...], int] = {}
        for row, stem in enumerate(self.stems):
            for length in range(len(stem) + 1):
                rows.setdefault(stem[:length], row)
        for index, word in enumerate(words):
            row = rows[word[:-1]]
            self._stem[index] = row
            for offset, token in enumerate(word):
                self._position[index, offset] = places[row] + offset
                self._token[index, offset] = token
                self._present[index, offset] = True

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Label scores float32 [batch_size, num_labels] from logits [batch_size, num_positions, vocab_size]."""
        return self._joined(self._log_probabilities(logits, self._position, slice(None)))

    def parts(self, most: int, bytes_of: Callable[[int], int]) -> list[tuple[int, int]]:
        """Ranges of stems to compute at once: (start, end), end excluded.

        Args:
            most: Bytes that a range may take, unless it is a single stem.
            bytes_of: Bytes that one row takes, from its number of tokens.
        """
        found, start = [], 0
        for end in range(1, len(self.stems) + 1):
            length = len(self.stems[end]) if end < len(self.stems) else 0
            count = end - start
            padded = count >= _LEAST_ROWS and length > _PADDING * len(self.stems[start])
            if end == len(self.stems) or padded or (count + 1) * bytes_of(length) > most:
                found.append((start, end))
                start = end
        return found

    def scores_behind(
        self,
        first: torch.Tensor,
        go_on: Callable[[Sequence[Sequence[int]]], torch.Tensor],
        ranges: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Label scores float32 [1, num_labels] of one text, some stems at a time.

        With gradients, what is computed behind the text is not kept but computed again on the way back, so that memory
        holds one part.

        Args:
            first: logits [vocab_size] behind the text.
            go_on: logits [count, vocab_size] behind every token of the stems that it is given.
            ranges: which stems to give it at once, see `parts`.
        """
        parts, order = [], []
        for start, end in ranges:
            mine = self._behind(start, end)
            order.append(mine)
            part = partial(self._words_behind, first, go_on, start, end, mine)
            if torch.is_grad_enabled():
                parts.append(checkpoint(part, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(part())
        return self._joined(torch.cat(parts, dim=1)[:, torch.cat(order).argsort().to(first.device)])

    def _words_behind(
        self,
        first: torch.Tensor,
        go_on: Callable[[Sequence[Sequence[int]]], torch.Tensor],
        start: int,
        end: int,
        mine: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probability [1, count] of the words `mine`, whose stems are `start` to `end` (excluded)."""
        stems = [stem for stem in self.stems[start:end] if stem]
        logits = torch.cat([first[None], go_on(stems)]) if stems else first[None]
        # A stem's first position is the text's own end, which stands in front of all.
        position = self._position - self._places[start] - (self._stem - start)[:, None]
        position[:, 0] = 0
        return self._log_probabilities(logits[None], position, mine)

    def _log_probabilities(self, logits: torch.Tensor, position: torch.Tensor, chosen: Any) -> torch.Tensor:
        """Log-probability [batch_size, count] of the chosen words, whose tokens are read at `position`."""
        position, token, present = (value[chosen].to(logits.device) for value in (position, self._token, self._present))
        logarithms = torch.log_softmax(logits.float(), dim=-1)
        return logarithms[:, position.clamp(min=0), token].masked_fill(~present, 0.0).sum(-1)

    def _behind(self, start: int, end: int) -> torch.Tensor:
        """Indices of the words that stand behind the stems `start` to `end` (excluded)."""
        return ((self._stem >= start) & (self._stem < end)).nonzero()[:, 0]

    def _joined(self, words: torch.Tensor) -> torch.Tensor:
        """Label scores float32 [batch_size, num_labels] from the log-probability of every word."""
        owner = self._owner.to(words.device)
        table = words.new_full((words.shape[0], self.num_labels, words.shape[1]), -torch.inf)
        index = owner[None, None].expand(words.shape[0], 1, -1)
        table = table.scatter(1, index, words[:, None])
        if self._aggregation == "max":
            return table.amax(-1)
        if self._aggregation == "mean":
            return table.masked_fill(table == -torch.inf, 0.0).sum(-1) / torch.bincount(
                owner, minlength=self.num_labels
            )
        return table.logsumexp(-1)
