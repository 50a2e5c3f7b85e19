"""What is asked of a teacher: the texts, the task and its labels, found before any base is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprompt.errors import DataError, InputError, UnsupportedError
from edgeprompt.evaluation.cells import label_key, label_of, text_of
from edgeprompt.evaluation.data import DataSource, column_names, read_records, source_name
from edgeprompt.evaluation.formats import Record
from edgeprompt.prompts.file import PromptFile, load_prompt
from edgeprompt.prompts.template import Template
from edgeprompt.tuning.files import text_source
from edgeprompt.tuning.instruction import (
    SHOTS,
    parse_instruction,
    with_shots,
)
from edgeprompt.tuning.options import Distillation, TuneOptions
from edgeprompt.tuning.plan import MAX_LABELS, DataFacts, inspect_data


@dataclass(frozen=True)
class Question:
    """What is asked of a teacher, before any base is loaded."""

    texts: DataSource
    count: int
    """Texts to learn from; those behind them are for evaluation alone."""
    total: int
    facts: DataFacts
    verbalizer: Mapping[str, tuple[str, ...]]
    template: Template | None
    """The instruction without solved examples."""
    prompt: PromptFile | None
    """The teacher's prompt, where it has one."""


class _Joined(Sequence[Record]):
    """Records of two sources, one behind the other."""

    def __init__(self, first: DataSource, second: DataSource) -> None:
        self._sources = (first, second)
        self.name = f"{source_name(first)}, then {source_name(second)}"

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain.from_iterable(map(read_records, self._sources))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def ask(data: DataSource, options: TuneOptions, asked: Distillation) -> Question:
    """Read the question off the options and the texts, which are checked.

    Raises:
        InputError: the instruction has no place for the text, or the labels are not known.
        DataError: a text is empty.
        UnsupportedError: a prompt or a task that cannot be distilled.
    """
    template = parse_instruction(asked.instruction) if asked.instruction is not None else None
    prompt = _teachers_prompt(asked.teacher_prompt) if asked.teacher_prompt is not None else None
    if template is not None and (SHOTS in template.slots) != bool(asked.shots) and not asked.shots:
        with_shots(template, "")  # says that there are none
    texts = text_source(data)
    slots = template.slots if template is not None else prompt.template.slots if prompt is not None else ()
    count = _check_texts(texts, [slot for slot in slots if slot != SHOTS], options)
    total = count
    if options.eval_data is not None:
        held = text_source(options.eval_data)
        total += _check_texts(held, [slot for slot in slots if slot != SHOTS], options)
        texts = _Joined(texts, held)
    verbalizer = dict(options.verbalizer) or dict(prompt.verbalizer if prompt is not None else {})
    facts = _facts(texts, options, asked, verbalizer, prompt)
    return Question(texts, count, total, facts, verbalizer, template, prompt)


def _check_texts(texts: DataSource, slots: Sequence[str], options: TuneOptions) -> int:
    """How many texts there are; every one must hold something."""
    count = 0
    for count, record in enumerate(read_records(texts), 1):
        where = f"row {count} of {source_name(texts)!r}"
        for slot in slots:
            column = options.text_column if slot == "text" else slot
            if not text_of(record, column, where).strip():
                raise DataError(f"{where}: the text in column {column!r} is empty; fill it in, or leave the row out")
    return count


def _facts(
    texts: DataSource,
    options: TuneOptions,
    asked: Distillation,
    verbalizer: Mapping[str, tuple[str, ...]],
    prompt: PromptFile | None,
) -> DataFacts:
    """The task and its labels: by label words, a label column, or the solved examples."""
    task = options.task or (prompt.task if prompt is not None else None)
    if task not in (None, "classify", "generate"):
        raise UnsupportedError(f"task {task!r} cannot be distilled; a teacher answers classify and generate")
    if task == "generate" or (task is None and not verbalizer and asked.label_column is None):
        shots = asked.shots_from
        if task is None and shots is not None and options.target_column not in column_names(shots):
            return inspect_data(shots, replace(options, task="classify", distil=None))
        if verbalizer or asked.label_column is not None:
            raise InputError("a verbalizer and --label-column are for --task classify; leave them out")
        return DataFacts("generate")
    if verbalizer:
        return DataFacts("classify", tuple(verbalizer))
    if asked.label_column is not None:
        return DataFacts("classify", _labels(texts, asked.label_column))
    if asked.shots_from is not None:
        return inspect_data(asked.shots_from, replace(options, task="classify", distil=None))
    raise InputError(
        'the labels are not known: name them with --verbalizer LABEL=" word", once for each, or give --label-column'
    )


def _labels(texts: DataSource, column: str) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(texts), 1):
        if record.get(column) in (None, ""):
            continue
        label = label_of(record, column, f"row {number} of {source_name(texts)!r}")
        found.setdefault(label_key(label), label)
        if len(found) > MAX_LABELS:
            raise DataError(f"column {column!r} of {source_name(texts)!r} has more than {MAX_LABELS} labels")
    if not found:
        raise DataError(f"no row of {source_name(texts)!r} has a label in column {column!r}; leave out --label-column")
    return tuple(sorted(found.values()))


def _teachers_prompt(path: Path) -> PromptFile:
    """A prompt that another base may learn from.

    Raises:
        UnsupportedError: what it answers with cannot be carried over.
    """
    prompt = load_prompt(path)
    if prompt.head_spec is not None:
        raise UnsupportedError(
            f"prompt {str(path)!r} answers through a head that was trained on its base's hidden states, which no other "
            "base has; tune one for the new base with labels"
        )
    if prompt.task not in ("classify", "generate") or prompt.encoder_past_key_values is not None:
        what = f"for {prompt.task}" if prompt.encoder_past_key_values is None else "deep in an encoder"
        raise UnsupportedError(f"prompt {str(path)!r} is {what}, and cannot be a teacher; classify and generate can")
    return prompt
