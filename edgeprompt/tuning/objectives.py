"""What a decoder's prompt is trained to do: pick a label word, or continue with the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from edgeprompt.data import Row, text_of
from edgeprompt.errors import DataError
from edgeprompt.template import Template
from edgeprompt.tokenizer import Tokenizer
from edgeprompt.tuning.causal import CausalPrompt
from edgeprompt.tuning.examples import Example
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.verbalizer import LabelWords
from edgeprompt.verbalizer import Verbalizer


@dataclass(frozen=True)
class Outcome:
    """Sums over a batch: the loss (with gradients), right answers, and how many answers there were."""

    loss: torch.Tensor
    correct: float
    count: int


class Objective(Protocol):
    """A task on one architecture."""

    metric: str
    """Name of `Outcome.correct / Outcome.count`."""

    @property
    def model(self) -> nn.Module:
        """The frozen base with its soft prompt."""

    def encode(self, row: Row, where: str) -> Example:
        """Tokenise one row; `where` names it in errors."""

    def shared(self) -> Any:
        """What many batches can share while the prompt stands still."""

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Loss and right answers of a batch."""


class Encoder:
    """Rows to token ids through the template, exactly as the runtime does it."""

    def __init__(
        self, template: Template, tokenizer: Tokenizer, options: TuneOptions, *, virtual: int, vocab_size: int
    ) -> None:
        """`virtual`: how many virtual ids a row carries (0 for a prefix)."""
        self.template, self.tokenizer, self.options = template, tokenizer, options
        self._virtual, self._vocab_size = virtual, vocab_size

    def fields(self, row: Row, where: str) -> dict[str, str]:
        """The template's slots from the columns of the same name; `{text}` is the text column."""
        columns = {slot: self.options.text_column if slot == "text" else slot for slot in self.template.slots}
        return {slot: text_of(row, column, where) for slot, column in columns.items()}

    def ids(self, fields: Mapping[str, str], *, room: int = 0) -> list[int]:
        """Token ids with `room` left of the longest length."""
        return self.template.encode(
            self.tokenizer,
            fields,
            num_virtual_tokens=self._virtual,
            first_virtual_id=self._vocab_size,
            max_length=self.options.max_length - room,
        )


class CausalClassify:
    """Classification through a verbalizer: cross-entropy over the labels' scores."""

    metric = "accuracy"

    def __init__(self, model: CausalPrompt, encoder: Encoder, verbalizer: Mapping[str, tuple[str, ...]]) -> None:
        """`verbalizer`: label -> label words, in label order."""
        self._model = model
        self._encoder = encoder
        self.labels = tuple(verbalizer)
        self.words = LabelWords(
            Verbalizer.compile(verbalizer, lambda word: encoder.tokenizer.encode(word, add_special_tokens=False))
        )
        self._room = max(len(stem) for stem in self.words.stems)

    @property
    def model(self) -> CausalPrompt:
        """The frozen base with its soft prompt."""
        return self._model

    def encode(self, row: Row, where: str) -> Example:
        """One row; its target is the label's index."""
        label = text_of(row, self._encoder.options.label_column, where)
        if label not in self.labels:
            raise DataError(
                f"{where}: label {label!r} has no verbalizer word; words are given for: {', '.join(self.labels)}"
            )
        return Example(self.text_ids(self._encoder.fields(row, where)), [self.labels.index(label)])

    def text_ids(self, fields: Mapping[str, str]) -> list[int]:
        """Token ids of a text to classify."""
        return self._encoder.ids(fields, room=self._room)

    @property
    def template(self) -> Template:
        """The template that texts are put into."""
        return self._encoder.template

    def shared(self) -> Any:
        """The prompt's keys and values."""
        return self.model.prefix()

    def scores(self, rows: Sequence[Sequence[int]], shared: Any = None) -> torch.Tensor:
        """Label scores float32 [len(rows), num_labels]."""
        stems = self.words.stems
        continued = [[*row, *stem] for row in rows for stem in stems]
        places = [range(len(row) - 1, len(row) + len(stem)) for row in rows for stem in stems]
        logits = self.model.logits(continued, places, shared)
        return self.words.scores(logits.view(len(rows), self.words.num_positions, -1))

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Cross-entropy over the labels, and how many of the best-scored labels are right."""
        scores = self.scores([example.ids for example in batch], shared)
        target = torch.tensor([example.target[0] for example in batch], device=scores.device)
        loss = nn.functional.cross_entropy(scores, target, reduction="sum")
        return Outcome(loss, float((scores.argmax(-1) == target).sum()), len(batch))


class CausalGenerate:
    """Generation: cross-entropy of the target's tokens, the end token included, and of nothing else."""

    metric = "token_accuracy"

    def __init__(self, model: CausalPrompt, encoder: Encoder, end: int) -> None:
        """`end`: id of the token that ends an answer."""
        self._model = model
        self._encoder = encoder
        self.end = end

    @property
    def model(self) -> CausalPrompt:
        """The frozen base with its soft prompt."""
        return self._model

    def encode(self, row: Row, where: str) -> Example:
        """One row; its target is the answer's token ids."""
        options = self._encoder.options
        text = text_of(row, options.target_column, where)
        target = [*self._encoder.tokenizer.encode(self.answer(text), add_special_tokens=False), self.end]
        if len(target) > options.max_length // 2:
            raise DataError(
                f"{where}: the target takes {len(target)} tokens, at most half of max_length {options.max_length} "
                "fit; raise --max-length or shorten it"
            )
        return Example(self._encoder.ids(self._encoder.fields(row, where), room=len(target)), target)

    def answer(self, text: str) -> str:
        """The target as it follows the template's last literal: set off by a space where neither brings one."""
        written = str(self._encoder.template)
        return text if written[-1].isspace() or text[:1].isspace() else f" {text}"

    def shared(self) -> Any:
        """The prompt's keys and values."""
        return self.model.prefix()

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Loss and right guesses summed over target tokens."""
        rows = [[*example.ids, *example.target[:-1]] for example in batch]
        places = [range(len(example.ids) - 1, len(row)) for example, row in zip(batch, rows, strict=True)]
        logits = self.model.logits(rows, places, shared).float()
        target = torch.tensor([token for example in batch for token in example.target], device=logits.device)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        return Outcome(loss, float((logits.argmax(-1) == target).sum()), len(target))
