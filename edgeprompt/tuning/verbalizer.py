"""Scores of label words in PyTorch: the same maths as `edgeprompt.verbalizer`, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LabelWords:
    """Label words as token ids, and which rows and positions a batch must compute to score them.

    The score of a word is the sum of its tokens' log-probabilities, the score of a label the log of the sum of its
    words' probabilities. A word of several tokens needs the text continued by the word's first tokens; words that
    share them share the row ("stem").
    """

    def __init__(self, labels: Sequence[Sequence[Sequence[int]]]) -> None:
        """`labels`: for every label its words, each a list of token ids."""
        words = [(label, tuple(word)) for label, options in enumerate(labels) for word in options]
        starts = {word[:-1] for _, word in words}
        self.stems: list[tuple[int, ...]] = sorted(
            stem for stem in starts if not any(other != stem and other[: len(stem)] == stem for other in starts)
        )
        self.num_labels = len(labels)
        places = [0]
        for stem in self.stems:
            places.append(places[-1] + len(stem) + 1)
        self.num_positions = places[-1]
        longest = max(len(word) for _, word in words)
        self._position = torch.zeros(len(words), longest, dtype=torch.long)
        self._token = torch.zeros(len(words), longest, dtype=torch.long)
        self._present = torch.zeros(len(words), longest, dtype=torch.bool)
        self._label = torch.tensor([label for label, _ in words])
        for index, (_, word) in enumerate(words):
            row = next(row for row, stem in enumerate(self.stems) if stem[: len(word) - 1] == word[:-1])
            for offset, token in enumerate(word):
                self._position[index, offset] = places[row] + offset
                self._token[index, offset] = token
                self._present[index, offset] = True

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Label scores float32 [batch_size, num_labels] from logits [batch_size, num_positions, vocab_size]."""
        position, token, present, label = (
            value.to(logits.device) for value in (self._position, self._token, self._present, self._label)
        )
        logarithms = torch.log_softmax(logits.float(), dim=-1)
        words = logarithms[:, position, token].masked_fill(~present, 0.0).sum(-1)
        table = words.new_full((words.shape[0], self.num_labels, words.shape[1]), -torch.inf)
        index = label[None, None].expand(words.shape[0], 1, -1)
        return table.scatter(1, index, words[:, None]).logsumexp(-1)
