"""Scores of label words in PyTorch: the formula of `edgeprompt.prompts.verbalizer`, with gradients."""

from __future__ import annotations

import torch

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
        longest = max(len(word) for word in words)
        self._position = torch.zeros(len(words), longest, dtype=torch.long)
        self._token = torch.zeros(len(words), longest, dtype=torch.long)
        self._present = torch.zeros(len(words), longest, dtype=torch.bool)
        self._owner = torch.tensor(verbalizer.owner)
        self._aggregation = verbalizer.aggregation
        for index, word in enumerate(words):
            row = next(row for row, stem in enumerate(self.stems) if stem[: len(word) - 1] == word[:-1])
            for offset, token in enumerate(word):
                self._position[index, offset] = places[row] + offset
                self._token[index, offset] = token
                self._present[index, offset] = True

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Label scores float32 [batch_size, num_labels] from logits [batch_size, num_positions, vocab_size]."""
        position, token, present, owner = (
            value.to(logits.device) for value in (self._position, self._token, self._present, self._owner)
        )
        logarithms = torch.log_softmax(logits.float(), dim=-1)
        words = logarithms[:, position, token].masked_fill(~present, 0.0).sum(-1)
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
