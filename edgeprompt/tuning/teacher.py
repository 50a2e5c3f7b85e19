"""A teacher: a frozen base that reads an instruction, or has a tuned prompt, and answers texts batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprompt import names
from edgeprompt.errors import InputError
from edgeprompt.evaluation.data import DataSource, read_records, source_name
from edgeprompt.tuning.answers import Answer, LabelAnswer, TextAnswer
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.examples import sorted_batches
from edgeprompt.tuning.objectives import WordClassify
from edgeprompt.tuning.prompted import PromptedLM

CHUNK = 1024
"""Texts that are grouped into batches of like length together."""
TOP = 32
"""Tokens whose probability is kept at each place of an answer; the others are one rest."""
_BATCH = 16
_PROBES = ("0", "Zebra", "(", "\u00e9")
"""Texts that have no first token in common: what the ids of all begin with is the instruction's own."""


class FixedPrompt(nn.Module):
    """A prompt that is not trained, where `SoftPrompt` stands otherwise."""

    tensor: torch.Tensor

    def __init__(self, tensor: torch.Tensor, *, is_prefix: bool) -> None:
        """`tensor`: embeddings [count, embedding_size], or a prefix as `SoftPrompt` makes one."""
        super().__init__()
        self.register_buffer("tensor", tensor)
        self.is_prefix = is_prefix
        self.num_virtual_tokens = int(tensor.shape[3] if is_prefix else tensor.shape[0])

    def forward(self) -> torch.Tensor:
        """The tensor."""
        return self.tensor


@dataclass(frozen=True)
class Ends:
    """What ends an answer, and how its tokens are chosen."""

    eos: tuple[int, ...]
    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    seed: int


class Teacher:
    """Answers texts; the same texts give the same answers, bit for bit, also after an interruption."""

    def __init__(
        self,
        model: PromptedLM,
        encoder: RecordEncoder,
        *,
        lead: Sequence[int] = (),
        verbalizer: Mapping[str, tuple[str, ...]],
        calibration: Sequence[float] = (),
        ends: Ends,
    ) -> None:
        """A teacher.

        Args:
            model: the base with what stands before its texts.
            encoder: turns records into ids.
            lead: ids that the model's prompt stands for: texts that begin with them go on from its keys and values.
            verbalizer: label -> words; empty for free text.
            calibration: subtracted from the labels' scores.
            ends: of free text.
        """
        self._model, self._encoder, self._lead = model, encoder, list(lead)
        self._words = WordClassify(model, encoder, verbalizer) if verbalizer else None
        self.words = {label: tuple(words) for label, words in verbalizer.items()}
        """Label -> words; empty for free text."""
        self._calibration, self._ends = torch.tensor(list(calibration) or [0.0]), ends
        self._room = self._words.words.longest if self._words else ends.max_new_tokens

    def answer(self, texts: DataSource, skip: int) -> Iterator[tuple[list[int], list[Answer]]]:
        """Batches of (rows of the data, their answers), without the first `skip`."""
        with torch.no_grad():
            shared = self._model.shared()
        number = 0
        records = enumerate(read_records(texts))
        while chunk := list(itertools.islice(records, CHUNK)):
            encoded = [self._ids(record, f"row {row + 1} of {source_name(texts)!r}") for row, record in chunk]
            for batch in self._batches(encoded):
                number += 1
                if number <= skip:
                    continue
                rows = [chunk[index][0] for index in batch]
                with torch.no_grad():
                    yield rows, self._answers([encoded[index] for index in batch], shared, rows[0])

    def _ids(self, record: Mapping[str, Any], where: str) -> list[int]:
        fields = self._encoder.fields(record, where)
        room = 0 if self._encoder.architecture == names.ENCODER_DECODER and not self._words else self._room
        return self._encoder.encode(fields, room=room, where=where).ids

    def _batches(self, encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices in batches: for labels of like length; for free text of one length, so that nothing is padded."""
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        if self._words:
            yield from sorted_batches(np.arange(len(encoded)), lengths, _BATCH)
            return
        for length in np.unique(lengths):
            yield from sorted_batches(np.flatnonzero(lengths == length), lengths, _BATCH)

    def _answers(self, texts: list[list[int]], shared: Any, first: int) -> list[Answer]:
        if self._lead:
            count = len(self._lead)
            if all(ids[:count] == self._lead and len(ids) > count for ids in texts):
                virtual = list(range(self._model.vocab_size, self._model.vocab_size + count))
                texts = [[*virtual, *ids[count:]] for ids in texts]
            else:  # a text whose first letters the tokenizer joins with the instruction's last
                shared = []
        if self._words:
            scores = self._words.scores(texts, shared).float().cpu() - self._calibration
            return [LabelAnswer(row.numpy()) for row in scores.log_softmax(-1)]
        return list(self.texts(texts, shared, first))

    def texts(self, texts: Sequence[Sequence[int]], shared: Any, first: int) -> list[TextAnswer]:
        """Free answers to texts of one length; `first` makes the random numbers of a batch its own."""
        return write_answers(self._model, self._encoder.tokenizer, texts, shared, self._ends, first)


def write_answers(
    model: PromptedLM, tokenizer: Any, texts: Sequence[Sequence[int]], shared: Any, ends: Ends, first: int = 0
) -> list[TextAnswer]:
    """Answers to texts of one length, token by token, until an end token, a stop text or the longest length."""
    draw = torch.Generator().manual_seed((ends.seed << 32) + first) if ends.temperature else None
    open_rows = set(range(len(texts)))
    made: list[list[int]] = [[] for _ in texts]
    best: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in texts]
    logits, state = model.open(texts, shared)
    while True:
        logprobs = logits.float().log_softmax(-1).cpu()
        values, tokens = logprobs.topk(min(TOP, logprobs.shape[-1]))
        chosen = tokens[:, 0]
        if draw is not None:
            chosen = torch.multinomial((logprobs / ends.temperature).softmax(-1), 1, generator=draw)[:, 0]
        for row in sorted(open_rows):
            made[row].append(int(chosen[row]))
            best[row].append((tokens[row], values[row]))
            written = tokenizer.decode(made[row]) if ends.stop else ""
            if (
                made[row][-1] in ends.eos
                or len(made[row]) >= ends.max_new_tokens
                or any(stop in written for stop in ends.stop)
            ):
                open_rows.discard(row)
        if not open_rows:
            break
        logits = model.step(state, chosen)
    return [_text_answer(tokenizer, ids, top, ends) for ids, top in zip(made, best, strict=True)]


def _text_answer(
    tokenizer: Any, ids: list[int], best: Sequence[tuple[torch.Tensor, torch.Tensor]], ends: Ends
) -> TextAnswer:
    """An answer cut where it ends; tokens that the teacher did not write itself have probability 1."""
    text = tokenizer.decode([token for token in ids if token not in ends.eos])
    places = [place for stop in ends.stop if (place := text.find(stop)) >= 0]
    known = len(ids)
    if places:
        text = text[: min(places)]
        while known and not text.startswith(tokenizer.decode(ids[:known])):
            known -= 1
        rest = text[len(tokenizer.decode(ids[:known])) :]
        ids = [*ids[:known], *(tokenizer.encode(rest, add_special_tokens=False) if rest else []), *ends.eos[:1]]
    count = len(best[0][0])
    top, logprobs = np.full((len(ids), count), -1, np.int32), np.full((len(ids), count), -np.inf, np.float32)
    for place in range(known):
        top[place], logprobs[place] = best[place][0].numpy(), best[place][1].numpy()
    for place in range(known, len(ids)):
        top[place, 0], logprobs[place, 0] = ids[place], 0.0
    return TextAnswer(text, np.array(ids, np.int32), top, logprobs)


def fixed_ids(encoder: RecordEncoder) -> list[int]:
    """The ids that every text of an encoder begins with."""
    all_ids = [encoder.encode(dict.fromkeys(encoder.template.slots, probe)).ids for probe in _PROBES]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*all_ids, strict=False))
    return [column[0] for column in same]


def check_length(count: int, room: int, limit: int, base: str, shots: int) -> None:
    """Refuse an instruction that leaves no place for a text.

    Raises:
        InputError: names the numbers of tokens.
    """
    if limit and count + room >= limit:
        less = "; take fewer --shots, or shorten it" if shots else "; shorten it"
        raise InputError(
            f"the instruction takes {count} tokens and the answer up to {room}, and {base} holds {limit} positions: no "
            f"text fits{less}"
        )
