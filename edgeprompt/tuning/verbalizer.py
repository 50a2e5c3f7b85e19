"""Scores of label words in PyTorch: the formula of `edgeprompt.prompts.verbalizer`, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from edgeprompt.prompts.verbalizer import Verbalizer


class LabelWords:
    """Which rows and positions a batch must compute to score the label words, and the scores from their logits.

    A word of several tokens needs the text continued by the word's first tokens (a "stem"); words with the same
    beginning share the row.
    """

    def __init__(self, verbalizer: Verbalizer) -> None:
        """`verbalizer`: labels and the token ids of their words."""
        words = verbalizer.words
        starts = {word[:-1] for word in words}
        self.stems: list[tuple[int, ...]] = sorted(
            stem for stem in starts if not any(other != stem and other[: len(stem)] == stem for other in starts)
        )
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
        for index, word in enumerate(words):
            row = next(row for row, stem in enumerate(self.stems) if stem[: len(word) - 1] == word[:-1])
            self._stem[index] = row
            for offset, token in enumerate(word):
                self._position[index, offset] = places[row] + offset
                self._token[index, offset] = token
                self._present[index, offset] = True

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Label scores float32 [batch_size, num_labels] from logits [batch_size, num_positions, vocab_size]."""
        return self.joined(self.words_of(logits, 0, len(self.stems)))

    def words_of(self, logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Log-probability, float32 [batch_size, count], of every word behind the stems `first` to `last` (excluded).

        `logits` [batch_size, positions, vocab_size] are those of these stems alone.
        """
        mine, places = self._behind(first, last), self._position - self._places[first]
        position, token, present = (value[mine].to(logits.device) for value in (places, self._token, self._present))
        logarithms = torch.log_softmax(logits.float(), dim=-1)
        return logarithms[:, position.clamp(min=0), token].masked_fill(~present, 0.0).sum(-1)

    def in_parts(self, size: int, words_behind: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Label scores from `words_behind(first, last)`, asked for `size` stems at a time.

        With gradients, a part's graph is not kept but computed again on the way back, so that memory holds one part's.
        """
        parts, order = [], []
        for first in range(0, len(self.stems), size):
            last = min(first + size, len(self.stems))
            order.append(self._behind(first, last).nonzero()[:, 0])
            if torch.is_grad_enabled():
                parts.append(checkpoint(words_behind, first, last, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(words_behind(first, last))
        words = torch.cat(parts, dim=1)
        return self.joined(words[:, torch.cat(order).argsort().to(words.device)])

    def _behind(self, first: int, last: int) -> torch.Tensor:
        """Which words stand behind the stems `first` to `last` (excluded)."""
        return (self._stem >= first) & (self._stem < last)

    def joined(self, words: torch.Tensor) -> torch.Tensor:
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
