"""What a prompt in front of a language model is trained to do: pick a label word, or continue with the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import known_label, label_of, target_of
from edgeprompt.evaluation.formats import Record
from edgeprompt.names import ENCODER_DECODER
from edgeprompt.package.tokenizer import UnreadableTextError
from edgeprompt.prompts.file import Array, Golden, Head
from edgeprompt.prompts.verbalizer import Verbalizer, text_before_words
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.examples import Example
from edgeprompt.tuning.prompted import Prompted, PromptedLM
from edgeprompt.tuning.verbalizer import LabelWords

GOLDEN_TOKENS = 8
GOLDEN_CANDIDATES = 8
"""Records of which one becomes the golden example."""
CLEAR = 1.0
"""By which the best logit of a golden example should exceed the next: kernels of other processors round otherwise."""
_ROWS = 64
"""Up to so many texts continued by label words are one batch; of more, each text is computed once."""
_CONTINUED = 1024
"""About so many continuations by label words are one evaluation batch, so that progress is heard of."""
_PART_BYTES = 256 << 20
"""About how much memory the label words that are computed at once behind a text may take."""


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
    by_loss: bool
    """Whether the loss, not the metric, says which prompt is the best."""

    @property
    def model(self) -> Prompted:
        """The frozen base with its soft prompt."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by class index; empty where there are none."""

    def fields(self, record: Record, where: str) -> dict[str, str]:
        """The template's slots filled from one record; `where` names it in errors."""

    def encode(self, record: Record, where: str) -> Example:
        """Tokenise one record."""

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Loss and right answers of a batch; `shared` is `self.model.shared()`, None computes it."""

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        """What the tuned prompt answers to one input."""

    def head(self) -> tuple[Head | None, Mapping[str, Array]]:
        """The task head that was trained along, for the prompt file."""


class WordClassify:
    """Classification through a verbalizer: cross-entropy over the labels' scores."""

    metric = "accuracy"
    by_loss = False

    def __init__(self, model: Any, encoder: RecordEncoder, verbalizer: Mapping[str, tuple[str, ...]]) -> None:
        """`model`: gives logits (`PromptedLM`, or an encoder with a mask); `verbalizer`: label -> words, in order."""
        self._model = model
        self.encoder = encoder
        self.words = LabelWords(
            Verbalizer.compile(
                verbalizer,
                lambda word: encoder.tokenizer.encode(word, add_special_tokens=False),
                behind=None if encoder.architecture == ENCODER_DECODER else text_before_words(encoder.template),
            )
        )
        self._labels = tuple(verbalizer)

    @property
    def model(self) -> Any:
        """The frozen base with its soft prompt."""
        return self._model

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by class index."""
        return self._labels

    def fields(self, record: Record, where: str) -> dict[str, str]:
        """The template's slots filled from one record."""
        return self.encoder.fields(record, where)

    def encode(self, record: Record, where: str) -> Example:
        """One record; its target is the label's index."""
        given = label_of(record, self.encoder.options.label_column, where)
        label = known_label(given, self._labels)
        if label is None:
            raise DataError(
                f"{where}: label {given!r} has no verbalizer word; words are given for: {', '.join(self._labels)}"
            )
        index = self._labels.index(label)
        return Example(
            self.encoder.encode(self.encoder.fields(record, where), room=self.words.longest, where=where).ids,
            [index],
            group=index,
        )

    def text_ids(self, fields: Mapping[str, str]) -> list[int]:
        """Token ids of a text to classify."""
        return self.encoder.encode(fields, room=self.words.longest).ids

    def scores(self, texts: Sequence[Sequence[int]], shared: Any = None) -> torch.Tensor:
        """Label scores float32 [len(texts), num_labels]."""
        stems = self.words.stems
        if len(stems) * len(texts) <= _ROWS or not self.words.longest:
            logits = self._model.logits(texts, [stems] * len(texts), shared)
            return self.words.scores(logits.view(len(texts), self.words.num_positions, -1))
        first, states = self._model.begin(texts, shared)
        found = []
        for text, logits, state in zip(texts, first, states, strict=True):
            parts = self.words.parts(_PART_BYTES, partial(self._model.bytes_of, len(text)))
            found.append(self.words.scores_behind(logits, partial(self._model.go_on, state), parts))
        return torch.cat(found)

    def at_once(self, most: int) -> int:
        """How many texts are one evaluation batch, at most `most`: fewer where there are many label words."""
        return max(1, min(most, _CONTINUED // len(self.words.stems)))

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Cross-entropy over the labels, and how many of the best-scored labels are right."""
        scores = self.scores([example.ids for example in batch], shared)
        target = torch.tensor([example.target[0] for example in batch], device=scores.device)
        loss = nn.functional.cross_entropy(scores, target, reduction="sum")
        return Outcome(loss, float((scores.argmax(-1) == target).sum()), len(batch))

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        """The label, and every label's score before calibration."""
        scores = self.scores([self.text_ids(fields)], shared)[0].double().cpu()
        adjusted = scores - torch.tensor(calibration, dtype=torch.float64) if calibration else scores
        return Golden(
            fields=dict(fields),
            label=self._labels[int(adjusted.argmax())],
            logits=dict(zip(self._labels, scores.tolist(), strict=True)),
        )

    def head(self) -> tuple[Head | None, Mapping[str, Array]]:
        """None: the output layer over the vocabulary is the head."""
        return None, {}


def texts_at_once(objective: Objective, most: int) -> int:
    """How many texts are one evaluation batch, at most `most`."""
    return objective.at_once(most) if isinstance(objective, WordClassify) else most


class Generate:
    """Generation: cross-entropy of the target's tokens, the end token included, and of nothing else."""

    metric = "token_accuracy"
    by_loss = True
    labels: tuple[str, ...] = ()

    def __init__(self, model: PromptedLM, encoder: RecordEncoder, *, end: int, whole_text: bool) -> None:
        """`end`: id of the token that ends an answer; `whole_text`: the target is a text of its own, with the
        tokenizer's special tokens (encoder-decoders), not what follows in the same text."""
        self._model = model
        self.encoder = encoder
        self._end, self._whole_text = end, whole_text

    @property
    def model(self) -> Prompted:
        """The frozen base with its soft prompt."""
        return self._model

    def fields(self, record: Record, where: str) -> dict[str, str]:
        """The template's slots filled from one record."""
        return self.encoder.fields(record, where)

    def encode(self, record: Record, where: str) -> Example:
        """One record; its target is the answer's token ids."""
        return self.encode_pair(record, where, target_of(record, self.encoder.options.target_column, where))

    def encode_pair(self, record: Record, where: str, answer: str) -> Example:
        """One record and the answer to it."""
        options = self.encoder.options
        try:
            target = self._target(answer)
        except UnreadableTextError as error:
            raise DataError(f"{where}: the target {error.reason}") from error
        if len(target) > options.max_length // 2:
            raise DataError(
                f"{where}: the target takes {len(target)} tokens, at most half of max_length {options.max_length} "
                "fit; raise --max-length or shorten it"
            )
        room = 0 if self._whole_text else len(target)
        return Example(self.encoder.encode(self.encoder.fields(record, where), room=room, where=where).ids, target)

    def _target(self, text: str) -> list[int]:
        if self._whole_text:
            ids = self.encoder.tokenizer.encode(text)
            return ids if ids[-1:] == [self._end] else [*ids, self._end]
        # Set off by a space, unless the template or the target brings one.
        space = "" if str(self.encoder.template)[-1].isspace() or text[:1].isspace() else " "
        return [*self.encoder.tokenizer.encode(space + text, add_special_tokens=False), self._end]

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        """Loss and right guesses summed over target tokens."""
        answers = [[example.target[:-1]] for example in batch]
        logits = self._model.logits([example.ids for example in batch], answers, shared).float()
        target = torch.tensor([token for example in batch for token in example.target], device=logits.device)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        return Outcome(loss, float((logits.argmax(-1) == target).sum()), len(target))

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        """The first tokens of the greedy answer, as far as they are clear, and the five best logits of the first."""
        ids = self.encoder.encode(fields).ids
        made: list[int] = []
        first: dict[str, float] = {}
        while len(made) < GOLDEN_TOKENS and self._end not in made:
            logits = self._model.logits([ids], [[made]], shared)[-1].float()
            best = logits.topk(min(5, len(logits)))
            if not first:
                first = {str(int(token)): float(value) for token, value in zip(best.indices, best.values, strict=True)}
            elif float(best.values[0] - best.values[1]) < CLEAR:
                break
            made.append(int(best.indices[0]))
        return Golden(fields=dict(fields), token_ids=tuple(made), logits=first)

    def head(self) -> tuple[Head | None, Mapping[str, Array]]:
        """None: the output layer over the vocabulary is the head."""
        return None, {}
