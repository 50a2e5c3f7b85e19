"""What a student is trained to do: answer as its teacher did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import known_label, label_of
from edgeprompt.evaluation.formats import Record
from edgeprompt.tuning.answers import LabelAnswer, TextAnswer
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.examples import Example
from edgeprompt.tuning.objectives import Generate, Outcome, WordClassify

_NO_LABEL = -1


class DistilClassify(WordClassify):
    """The divergence of the labels' distribution from the teacher's; where a label is known, cross-entropy mixed in.

    The loss of a text: (1 - weight) KL(teacher || student) + weight * cross-entropy of its label.
    """

    metric = "agreement"

    def __init__(
        self,
        model: Any,
        encoder: RecordEncoder,
        verbalizer: Mapping[str, tuple[str, ...]],
        *,
        label_column: str | None,
        weight: float,
    ) -> None:
        """`label_column`: where labels stand, None for none; `weight`: the share of cross-entropy."""
        super().__init__(model, encoder, verbalizer)
        self._column, self._weight = label_column, weight

    def encode_answered(self, record: Record, where: str, answer: LabelAnswer) -> Example:
        """One record and what the teacher said of it; the example's target is its label, where there is one."""
        ids = self.encoder.encode(self.encoder.fields(record, where), room=self.words.longest, where=where).ids
        label = self._label(record, where)
        return Example(ids, [label], answer.logprobs.view(np.int32).tolist(), group=int(answer.logprobs.argmax()))

    def _label(self, record: Record, where: str) -> int:
        if self._column is None or record.get(self._column) in (None, ""):
            return _NO_LABEL
        given = label_of(record, self._column, where)
        label = known_label(given, self.labels)
        if label is None:
            raise DataError(
                f"{where}: label {given!r} has no verbalizer word; words are given for: {', '.join(self.labels)}"
            )
        return self.labels.index(label)

    def compare(self, batch: Sequence[Example], shared: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The student's scores, the teacher's log-probabilities [batch_size, num_labels], and the labels (or -1)."""
        scores = self.scores([example.ids for example in batch], shared)
        said = np.array([example.types for example in batch], np.int32).view(np.float32)
        labels = torch.tensor([example.target[0] for example in batch], device=scores.device)
        return scores, torch.from_numpy(said).to(scores.device), labels

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """The loss, and in how many texts the best label is the teacher's."""
        scores, teacher, labels = self.compare(batch, shared)
        loss = nn.functional.kl_div(scores.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
        known = labels != _NO_LABEL
        if bool(known.any()) and self._weight:
            right = nn.functional.cross_entropy(scores, labels.clamp(min=0), reduction="none")
            loss = torch.where(known, (1 - self._weight) * loss + self._weight * right, loss)
        return Outcome(loss.sum(), float((scores.argmax(-1) == teacher.argmax(-1)).sum()), len(batch))


class DistilGenerate(Generate):
    """The divergence of every token's distribution from the teacher's, over the tokens that the teacher wrote.

    Of each distribution the most likely tokens are known, and the rest is one event: the sum over those is a lower
    bound of the divergence over the whole vocabulary.
    """

    metric = "agreement"

    def encode_answered(self, record: Record, where: str, answer: TextAnswer) -> Example:
        """One record and what the teacher wrote to it."""
        known = answer.top < self._model.vocab_size  # the teacher's vocabulary may have been padded further
        top = np.where(known, answer.top, -1)
        logprobs = np.where(known, answer.logprobs, -np.inf).astype(np.float32)
        ids = answer.ids.tolist()
        room = 0 if self._whole_text else len(ids)
        encoded = self.encoder.encode(self.encoder.fields(record, where), room=room, where=where).ids
        return Example(encoded, ids, [*top.ravel().tolist(), *logprobs.ravel().view(np.int32).tolist()])

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Loss over the teacher's tokens, and how often the student's most likely token is the teacher's."""
        answers = [[example.target[:-1]] for example in batch]
        logits = self._model.logits([example.ids for example in batch], answers, shared).float()
        top, said = self._told(batch)
        top, said = top.to(logits.device), said.to(logits.device)
        logprobs = logits.log_softmax(-1)
        mine = logprobs.gather(1, top.clamp(min=0))
        there = (top >= 0) & (said > -torch.inf)
        chance = torch.where(there, said.exp(), 0.0)
        loss = torch.where(there, chance * (said - mine), 0.0).sum(-1)
        rest = (1 - chance.sum(-1)).clamp(min=0)
        mine_rest = (1 - torch.where(there, mine.exp(), 0.0).sum(-1)).clamp(min=1e-9)
        loss = loss + torch.where(rest > 1e-6, rest * (rest.clamp(min=1e-9).log() - mine_rest.log()), 0.0)
        return Outcome(loss.sum(), float((logits.argmax(-1) == top[:, 0]).sum()), len(top))

    @staticmethod
    def _told(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's most likely tokens and their log-probabilities, [tokens of the batch, count] each."""
        tops, said = [], []
        for example in batch:
            packed = np.array(example.types, np.int32)
            half = len(packed) // 2
            tops.append(packed[:half].reshape(len(example.target), -1))
            said.append(packed[half:].view(np.float32).reshape(len(example.target), -1))
        return torch.from_numpy(np.concatenate(tops).astype(np.int64)), torch.from_numpy(np.concatenate(said))


class DistilText(Generate):
    """Cross-entropy of the teacher's text in the student's own tokens (sequence-level distillation)."""

    metric = "agreement"

    def encode_answered(self, record: Record, where: str, answer: TextAnswer) -> Example:
        """One record and what the teacher wrote to it."""
        return self.encode_pair(record, where, answer.text)
