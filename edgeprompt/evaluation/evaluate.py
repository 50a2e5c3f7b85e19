"""Prompts scored on data, as a runtime serves them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprompt.errors import DataError, InputError, UnsupportedError
from edgeprompt.evaluation.cells import (
    given_answers,
    known_label,
    label_of,
    labels_of,
    number_of,
    tagged_words,
    target_of,
)
from edgeprompt.evaluation.data import DataSource, read_records
from edgeprompt.evaluation.formats import Record
from edgeprompt.evaluation.metrics import Score, default_metric, score
from edgeprompt.evaluation.requests import RECORDS_AT_ONCE, answers, batches, fields_of
from edgeprompt.prompts.encoder_text import words_of
from edgeprompt.prompts.file import PromptFile
from edgeprompt.request import Answer, Classification, Generation, GenerationOptions, Request, Result, Tagging
from edgeprompt.runtime import Runtime


@dataclass(frozen=True)
class Columns:
    """Where in a record the text, the label and the right answer stand."""

    text: str = "text"
    label: str = "label"
    target: str = "target"

    def fields(self, prompt: PromptFile, record: Record, number: int) -> dict[str, str]:
        """The template's slots; words to tag are joined by spaces."""
        return fields_of(record, self.text, prompt, f"row {number}")

    def references(self, prompt: PromptFile, record: Record, number: int) -> list[Any]:
        """What is right: one text, or a tag for each word; several labels are one set, answers of a question a tuple.

        Raises:
            DataError: the column is missing, or a label is none of the prompt's.
        """
        where = f"row {number}"
        if prompt.task == "qa" and record.get(self.target) is None:
            return [given_answers(record, self.fields(prompt, record, number)["context"], where)]
        if prompt.task in ("generate", "qa"):
            return [target_of(record, self.target, where)]
        problem = prompt.head_spec.problem_type if prompt.head_spec else "single_label"
        if problem == "regression":
            return [repr(number_of(record, self.label, where))]
        known = tuple(prompt.verbalizer) or prompt.labels
        if prompt.task == "tag":
            given = tagged_words(record, where)[1]
        elif problem == "multi_label":
            given = labels_of(record, self.label, where)
        else:
            given = [label_of(record, self.label, where)]
        found = []
        for label in given:
            meant = known_label(label, known)
            if meant is None:
                raise DataError(
                    f"{where}: label {label!r} is not a label of prompt {prompt.name!r} ({', '.join(known)})"
                )
            found.append(meant)
        return [frozenset(found)] if problem == "multi_label" else found


def evaluate(
    runtime: Runtime,
    prompts: Mapping[str, PromptFile],
    records: Iterator[Record],
    columns: Columns,
    *,
    metric: str | None,
    options: GenerationOptions,
) -> dict[str, Score]:
    """The score of every prompt over the same records; memory holds the short answers and one batch of texts."""
    said: dict[str, list[Any]] = {name: [] for name in prompts}
    right: list[Any] = []
    first = next(iter(prompts.values()))
    number = 0
    for batch in batches(records, RECORDS_AT_ONCE):
        requests = []
        for record in batch:
            number += 1
            right += columns.references(first, record, number)
            for name, prompt in prompts.items():
                fields = columns.fields(prompt, record, number)
                requests.append((number, Request(text=fields, prompt=name, options=options, truncate=True)))
        for (_, request), result in zip(requests, answers(runtime, requests), strict=True):
            said[str(request.prompt)] += _said(prompts[str(request.prompt)], request, result)
    labels = first.task in ("classify", "tag") and not _is_regression(first)
    name = metric or ("mae" if _is_regression(first) else default_metric(first.task))
    spans = first.task == "qa"
    return {prompt: score(name, guesses, right, labels=labels, spans=spans) for prompt, guesses in said.items()}


def check_task(prompts: Mapping[str, PromptFile], metric: str | None) -> None:
    """Refuse, before any work, what cannot be compared.

    Raises:
        InputError: prompts of different tasks, or a metric that does not fit.
        UnsupportedError: a task without a metric here.
    """
    tasks = {prompt.task for prompt in prompts.values()}
    if len(tasks) > 1:
        raise InputError(f"the prompts are for different tasks ({', '.join(sorted(tasks))}); evaluate each on its data")
    (task,) = tasks
    if task not in ("classify", "generate", "qa", "tag"):
        raise UnsupportedError(f"eval has no metric for task {task!r}; it knows classify, generate, qa and tag")
    several = any(prompt.head_spec and prompt.head_spec.problem_type == "multi_label" for prompt in prompts.values())
    numbers = any(map(_is_regression, prompts.values()))
    for needed, fits in (
        (("accuracy",), several),
        (("mae",), numbers),
        (("accuracy", "f1"), task == "tag"),
        (("accuracy", "f1", "exact-match", "rouge", "bleu"), task == "classify" and not several and not numbers),
        (("f1", "exact-match", "rouge", "bleu"), task in ("generate", "qa")),
    ):
        if fits and metric is not None and metric not in needed:
            raise InputError(f"metric {metric} does not fit {_kind(task, several, numbers)}; use {' or '.join(needed)}")


def _kind(task: str, several: bool, numbers: bool) -> str:
    return "several labels" if several else "numbers" if numbers else f"task {task}"


def _is_regression(prompt: PromptFile) -> bool:
    return prompt.head_spec is not None and prompt.head_spec.problem_type == "regression"


def draw_shots(
    prompt: PromptFile, source: DataSource, columns: Columns, count: int, seed: int
) -> Sequence[tuple[Mapping[str, str], str]]:
    """`count` solved examples drawn by the seed, labels as equally many as can be, in one pass over the data."""
    by_label: dict[str, list[tuple[Mapping[str, str], str]]] = {}
    seen: dict[str, int] = {}
    draw = random.Random(seed)
    for number, record in enumerate(read_records(source), 1):
        (answer,) = columns.references(prompt, record, number)
        answer = answer[0] if isinstance(answer, tuple) else answer
        kind = answer if prompt.task == "classify" else ""
        kept = by_label.setdefault(kind, [])
        seen[kind] = seen.get(kind, 0) + 1
        # Reservoir sampling (Vitter 1985): every record is equally likely to stay, without holding the data.
        place = len(kept) if len(kept) < count else draw.randrange(seen[kind])
        if place < count:
            kept[place : place + 1] = [(columns.fields(prompt, record, number), answer)]
    groups = [by_label[kind] for kind in sorted(by_label)]
    turns = [group[place] for place in range(count) for group in groups if place < len(group)]
    picked = turns[:count]
    draw.shuffle(picked)
    return picked


def _said(prompt: PromptFile, request: Request, result: Result) -> list[Any]:
    """What was answered, as `Columns.references` has it."""

    if isinstance(result, Classification):
        several = prompt.head_spec is not None and prompt.head_spec.problem_type == "multi_label"
        return [frozenset(result.labels) if several else result.label]
    if isinstance(result, Tagging):
        assert isinstance(request.text, Mapping), "the template's slots"
        (text,) = request.text.values()
        labels = {word.start: word.label for word in result.words}
        return [labels.get(start, "O") for start, _ in words_of(text)]  # a cut text's last words have no label
    assert isinstance(result, (Generation, Answer)), "check_task lets no other task in"
    return [result.text.strip()]
