"""Tasks of encoders with a head that is trained along: classification, tagging, question answering."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import given_answer, known_label, label_of, labels_of, number_of, tagged_words
from edgeprompt.evaluation.formats import Record
from edgeprompt.heads.answers import answer
from edgeprompt.prompts.encoder_text import EncodedText, first_tokens, words_of
from edgeprompt.prompts.file import Array, Golden, Head, HeadStep
from edgeprompt.tuning.encoder import EncoderPrompt
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.examples import Example
from edgeprompt.tuning.objectives import Outcome

IGNORED = -100
"""Target of what the loss does not look at, as PyTorch has it."""


class _Head(nn.Module):
    """The base with its prompt and one linear layer on top."""

    def __init__(self, prompted: EncoderPrompt, outputs: int) -> None:
        super().__init__()
        self.prompted = prompted
        self.classifier = nn.Linear(prompted.base.config.hidden_size, outputs)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> _Head:
        super().train(mode)
        self.prompted.train(mode)
        return self

    @property
    def soft(self) -> Any:
        return self.prompted.soft

    @property
    def base(self) -> Any:
        return self.prompted.base

    def shared(self) -> Any:
        return self.prompted.shared()


class _HeadTask:
    """What the tasks with a head share."""

    by_loss = False
    source = "tokens"
    problem_type = "single_label"

    def __init__(self, prompted: EncoderPrompt, encoder: RecordEncoder, labels: tuple[str, ...], outputs: int) -> None:
        self.encoder = encoder
        self.labels = labels
        self._model = _Head(prompted, outputs)

    @property
    def model(self) -> Any:
        """The frozen base with its soft prompt and head."""
        return self._model

    def fields(self, record: Record, where: str) -> dict[str, str]:
        """The template's slots filled from one record."""
        return self.encoder.fields(record, where)

    def head(self) -> tuple[Head | None, Mapping[str, Array]]:
        """One linear layer on what `source` says."""
        layer = self._model.classifier
        tensors: dict[str, Array] = {
            f"classifier.{name}": tensor.detach().float().cpu().numpy().copy()
            for name, tensor in layer.named_parameters()
        }
        return Head(self.source, (HeadStep("linear", "classifier"),), self.problem_type), tensors

    def states(self, batch: Sequence[Example], shared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of a batch, and which positions are text."""
        return self._model.prompted.states(
            [example.ids for example in batch], [example.types for example in batch], shared
        )


class HeadClassify(_HeadTask):
    """Classification or regression from the mean of the text's hidden states."""

    source = "mean"

    def __init__(
        self, prompted: EncoderPrompt, encoder: RecordEncoder, labels: tuple[str, ...], problem_type: str
    ) -> None:
        """`problem_type`: "single_label", "multi_label" or "regression" (no labels)."""
        super().__init__(prompted, encoder, labels, max(1, len(labels)))
        self.problem_type = problem_type
        self.by_loss = problem_type == "regression"
        self.metric = {"single_label": "accuracy", "multi_label": "exact_match", "regression": "within_half"}[
            problem_type
        ]

    def encode(self, record: Record, where: str) -> Example:
        """One record; its target is a class, a 0 or 1 for each label, or a number's bits."""
        encoded = self.encoder.encode(self.encoder.fields(record, where), where=where)
        target = self._target(record, where)
        return Example(encoded.ids, target, types_of(encoded), target[0] if self.problem_type == "single_label" else -1)

    def _target(self, record: Record, where: str) -> list[int]:
        column = self.encoder.options.label_column
        if self.problem_type == "regression":
            return [struct.unpack("<i", struct.pack("<f", _number(record, column, where)))[0]]
        given = (
            labels_of(record, column, where)
            if self.problem_type == "multi_label"
            else [label_of(record, column, where)]
        )
        given = [self._known(label, where) for label in given]
        if self.problem_type == "multi_label":
            return [int(label in given) for label in self.labels]
        return [self.labels.index(given[0])]

    def _known(self, label: str, where: str) -> str:
        found = known_label(label, self.labels)
        if found is None:
            raise DataError(f"{where}: label {label!r} is not one of the training data's: {', '.join(self.labels)}")
        return found

    def values(self, batch: Sequence[Example], shared: Any = None) -> torch.Tensor:
        """What the head says, float32 [batch_size, num_labels]."""
        states, real = self.states(batch, shared)
        weight = real.to(states.dtype)[..., None]
        return self._model.classifier(((states * weight).sum(1) / weight.sum(1)).float())  # type: ignore[no-any-return]

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Cross-entropy, binary cross-entropy by label, or squared error."""
        values = self.values(batch, shared)
        targets = np.array([example.target for example in batch], np.int32)
        if self.problem_type == "regression":
            wanted = torch.from_numpy(targets.view(np.float32)).to(values.device)
            error = values - wanted
            return Outcome((error**2).sum(), float((error.abs() < 0.5).sum()), len(batch))
        target = torch.from_numpy(targets).to(values.device)
        if self.problem_type == "multi_label":
            loss = nn.functional.binary_cross_entropy_with_logits(values, target.float(), reduction="none").mean(1)
            return Outcome(loss.sum(), float(((values > 0) == (target > 0)).all(1).sum()), len(batch))
        loss = nn.functional.cross_entropy(values, target[:, 0].long(), reduction="sum")
        return Outcome(loss, float((values.argmax(-1) == target[:, 0]).sum()), len(batch))

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        """The best label (regression: none), and the head's values."""
        encoded = self.encoder.encode(fields)
        values = self.values([Example(encoded.ids, [], types_of(encoded))], shared)[0].tolist()
        names = self.labels or ("LABEL_0",)
        best = names[int(np.argmax(values))] if self.labels else None
        return Golden(dict(fields), label=best, logits=dict(zip(names, values, strict=True)))


class Tag(_HeadTask):
    """A label for every word, read at the word's first token."""

    metric = "word_accuracy"

    def __init__(self, prompted: EncoderPrompt, encoder: RecordEncoder, labels: tuple[str, ...]) -> None:
        super().__init__(prompted, encoder, labels, len(labels))

    def fields(self, record: Record, where: str) -> dict[str, str]:
        """The words of one record, joined by spaces."""
        return {self.encoder.located: " ".join(tagged_words(record, where)[0])}

    def encode(self, record: Record, where: str) -> Example:
        """One record; its target is a class for the first token of every word, and nothing for other tokens."""
        words, tags = tagged_words(record, where)
        text = " ".join(words)
        encoded = self.encoder.encode({self.encoder.located: text}, locate=True, where=where)
        target = [IGNORED] * len(encoded.ids)
        for token, tag in zip(first_tokens(words_of(text), encoded.offsets), tags, strict=True):
            if tag not in self.labels:
                raise DataError(f"{where}: tag {tag!r} is not one of the training data's: {', '.join(self.labels)}")
            if token is not None:
                target[token] = self.labels.index(tag)
        return Example(encoded.ids, target, types_of(encoded))

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Cross-entropy and right labels over words."""
        states, _ = self.states(batch, shared)
        logits = self._model.classifier(states.float())
        target = torch.full(logits.shape[:2], IGNORED)
        for index, example in enumerate(batch):
            target[index, : len(example.target)] = torch.tensor(example.target)
        target = target.to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        known = target != IGNORED
        return Outcome(loss, float((logits.argmax(-1) == target)[known].sum()), int(known.sum()))

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        """The first word's label, and the head's values for it."""
        encoded = self.encoder.encode(fields, locate=True)
        first = first_tokens(words_of(fields[self.encoder.located]), encoded.offsets)[0]
        states, _ = self.states([Example(encoded.ids, [], types_of(encoded))], shared)
        values = self._model.classifier(states[0, first or 0].float()).tolist()
        best = self.labels[int(np.argmax(values))]
        return Golden(dict(fields), label=best, logits=dict(zip(self.labels, values, strict=True)))


class AnswerSpan(_HeadTask):
    """Extractive question answering: the first and the last token of the answer in the context."""

    metric = "exact_match"

    def __init__(self, prompted: EncoderPrompt, encoder: RecordEncoder, *, allow_no_answer: bool = False) -> None:
        super().__init__(prompted, encoder, (), 2)
        self._allow_no_answer = allow_no_answer

    def encode(self, record: Record, where: str) -> Example:
        """One record; its target is (first, last) token of the answer, the first text token where there is none."""
        fields = self.encoder.fields(record, where)
        answer, start = given_answer(record, fields[self.encoder.located], where)
        encoded = self.encoder.encode(fields, locate=True, where=where)
        if not answer:
            nothing = self.encoder.num_virtual_ids
            return Example(encoded.ids, [nothing, nothing], types_of(encoded))
        end = start + len(answer)
        inside = [index for index, span in enumerate(encoded.offsets) if span and span[0] < end and span[1] > start]
        cut = not inside or (encoded.offsets[inside[-1]] or (0, 0))[1] < end
        target = [IGNORED, IGNORED] if cut else [inside[0], inside[-1]]  # cut away with the end of the context
        return Example(encoded.ids, target, types_of(encoded))

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Cross-entropy of both ends over the text's positions, and how often both are right."""
        states, real = self.states(batch, shared)
        logits = self._model.classifier(states.float()).masked_fill(~real[..., None], -1e4)
        target = torch.tensor([example.target for example in batch], device=logits.device)
        known = target[:, 0] != IGNORED
        ends = logits.transpose(1, 2).flatten(0, 1)  # [2 * batch_size, sequence_length]
        loss = nn.functional.cross_entropy(ends, target.flatten(), reduction="sum") / 2
        right = (logits.argmax(1) == target).all(1) & known
        return Outcome(loss, float(right.sum()), max(1, int(known.sum())))

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        """The answer, and the best scores of a first and of a last token."""
        encoded = self.encoder.encode(fields, locate=True)
        states, real = self.states([Example(encoded.ids, [], types_of(encoded))], shared)
        logits = self._model.classifier(states.float()).masked_fill(~real[..., None], -torch.inf)[0].cpu().numpy()
        nothing = self.encoder.num_virtual_ids if self._allow_no_answer else None
        found = answer(logits, encoded.offsets, fields[self.encoder.located], nothing)
        start, end = logits.max(0).tolist()
        return Golden(dict(fields), label=found.text, logits={"start": start, "end": end})


def _number(record: Record, column: str, where: str) -> float:
    number = number_of(record, column, where)
    if abs(number) > float(np.finfo(np.float32).max):
        raise DataError(f"{where}: {number:g} in column {column!r} is beyond what float32 holds; scale the numbers")
    return number


def types_of(encoded: EncodedText) -> list[int]:
    """Segments of the tokens, empty where all are 0."""
    return encoded.type_ids if any(encoded.type_ids) else []
