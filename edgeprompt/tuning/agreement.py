"""How closely a student follows its teacher on the held-out texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from edgeprompt import progress
from edgeprompt.evaluation.data import read_records
from edgeprompt.evaluation.metrics import score
from edgeprompt.progress import Update
from edgeprompt.tuning.answers import TextAnswer
from edgeprompt.tuning.distilled import DistilClassify
from edgeprompt.tuning.prepare import Run
from edgeprompt.tuning.question import Question
from edgeprompt.tuning.runs import RunData
from edgeprompt.tuning.teach import Taught
from edgeprompt.tuning.teacher import CHUNK, write_answers

_WRITTEN = 64
"""Most held-out texts that the student answers freely, for the report."""
_TIMED = 15
"""Texts that the time to the first token is measured on."""


@torch.no_grad()
def figures_of(run: Run, found: RunData, taught: Taught, loop: Any, *, show: bool) -> dict[str, Any]:
    """How closely the student follows its teacher on the held-out texts, on every package's weights; `show` progress
    on stderr."""
    if not found.eval_batches:
        return {}
    model = run.objective.model
    model.eval()
    made = []
    for turn in range(max(1, len(run.weights))):
        run.weights.use(turn)
        with loop.accelerator.autocast():
            shared = model.shared()
            shown = show and loop.accelerator.is_main_process
            with progress.show("comparing", 1.0, wanted=shown) as tell:
                is_label = run.plan.task == "classify"
                one = _labelled(run, found, shared, tell) if is_label else _written(run, found, taught, shared, tell)
        if len(run.weights) > 1:
            one = {"package": run.weights.packages[turn].path.name, **one}
        made.append(one)
    run.weights.use(0)
    return made[0] if len(made) == 1 else {"on": made}


def _labelled(run: Run, found: RunData, shared: Any, tell: Update) -> dict[str, Any]:
    student, teacher, labels = [], [], []
    assert isinstance(run.objective, DistilClassify)
    for number, batch in enumerate(found.eval_batches, 1):
        scores, said, given = run.objective.compare([found.eval_examples[index] for index in batch], shared)
        student += scores.argmax(-1).tolist()
        teacher += said.argmax(-1).tolist()
        labels += given.tolist()
        tell(number / len(found.eval_batches), "")
    figures: dict[str, Any] = {"agreement": _share([int(a == b) for a, b in zip(student, teacher, strict=True)])}
    often, times = Counter(teacher).most_common(1)[0]
    figures["teacher_says_most"] = {"label": run.objective.labels[often], "share": round(times / len(teacher), 4)}
    known = [index for index, label in enumerate(labels) if label >= 0]
    if known:
        figures["accuracy"] = _share([int(student[index] == labels[index]) for index in known])
        figures["teacher_accuracy"] = _share([int(teacher[index] == labels[index]) for index in known])
    return figures


def _share(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its standard error, of at least one text that might be otherwise where all are alike."""
    count = len(values)
    mean = sum(values) / count
    spread = max(mean * (1 - mean), 1 / (count + 1) * (1 - 1 / (count + 1)))
    return {"value": round(mean, 4), "standard_error": round(math.sqrt(spread / count), 4), "n": count}


def _written(run: Run, found: RunData, taught: Taught, shared: Any, tell: Update) -> dict[str, Any]:
    right, count = [], []
    for batch in found.eval_batches:
        for index in batch:
            outcome = run.objective.measure([found.eval_examples[index]], shared)
            right.append(outcome.correct)
            count.append(outcome.count)
    share = sum(right) / sum(count)
    # A ratio of sums over texts: the linearised error.
    error = math.sqrt(sum((a - share * b) ** 2 for a, b in zip(right, count, strict=True))) / sum(count)
    tokens = {"value": round(share, 4), "standard_error": round(error, 4), "n": len(count)}
    wanted = sorted(index for batch in found.eval_batches for index in batch)[:_WRITTEN]
    texts = {}
    for index, answer in enumerate(taught.answers.read(TextAnswer, CHUNK)):
        if index in wanted and isinstance(answer, TextAnswer):
            texts[index] = answer.text.strip()
    ends = replace(taught.ends, eos=run.tokens.eos, temperature=0.0, stop=())
    student = []
    for number, index in enumerate(wanted, 1):
        (answer,) = write_answers(run.model, run.tokenizer, [found.eval_examples[index].ids], shared, ends)
        student.append(answer.text.strip())
        tell(number / len(wanted), "")
    figures: dict[str, Any] = {"token_agreement": tokens}
    with suppress(ImportError):  # rouge is optional
        rouge = score("rouge", student, [texts[index] for index in wanted])
        figures["rouge_to_teacher"] = {
            "value": round(rouge.value, 4), "standard_error": round(rouge.standard_error, 4), "n": rouge.n
        }  # fmt: skip
    return figures


def held_fields(run: Run, found: RunData, question: Question) -> list[dict[str, str]]:
    """Fields of some held-out texts."""
    wanted = set(sorted(index for batch in found.eval_batches for index in batch)[:_TIMED])
    wanted = wanted or set(found.indices[:_TIMED].tolist())
    return [
        run.objective.fields(record, f"row {number + 1}")
        for number, record in enumerate(read_records(question.texts))
        if number in wanted
    ]
