"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): one shared prompt, a small factor for every task.

At the end every task's prompt is composed and written as a prompt file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprompt.errors import DataError, InputError
from edgeprompt.evaluation.cells import known_label, label_of
from edgeprompt.evaluation.data import DataSource, read_records, source_name
from edgeprompt.evaluation.formats import Record
from edgeprompt.prompts.file import Array, Golden, Head, save_prompt
from edgeprompt.tuning.examples import Example
from edgeprompt.tuning.files import check_inputs, check_outputs
from edgeprompt.tuning.objectives import Objective, Outcome
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.plan import MAX_LABELS, inspect_data
from edgeprompt.tuning.prepare import Run, another_task, prepare
from edgeprompt.tuning.runs import TuneResult, make_loop, prompt_file, read_data

_MAX_TASKS = 1000


class _TaskRecords(Sequence[Record]):
    """The records of one task, streamed anew each time."""

    def __init__(self, data: DataSource, column: str, task: str) -> None:
        self._data, self._column, self._task = data, column, task
        self.name = f"task {task} of {source_name(data)}"

    def __iter__(self) -> Iterator[Record]:
        for number, record in enumerate(read_records(self._data), 1):
            if label_of(record, self._column, f"row {number} of {source_name(self._data)!r}") == self._task:
                yield record

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class _Models(nn.Module):
    """The tasks' models; what they share is there once for the optimizer."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        self.tasks = nn.ModuleList(models)

    @property
    def base(self) -> Any:
        return self.tasks[0].base

    @property
    def soft(self) -> Any:
        return self.tasks[0].soft

    def shared(self) -> list[Any]:
        """`shared` of every task."""
        found = []
        for index in range(len(self.tasks)):
            model: Any = self.tasks[index]
            self.soft.task = index
            found.append(model.shared())
        return found


class _Tasks:
    """All tasks as one objective: an example's first target is its task, a batch's loss the sum over tasks."""

    labels: tuple[str, ...] = ()

    def __init__(self, objectives: Mapping[str, Objective], column: str) -> None:
        self._tasks = list(objectives)
        self._objectives = list(objectives.values())
        self._column = column
        self.metric = self._objectives[0].metric
        self.by_loss = any(objective.by_loss for objective in self._objectives)
        self._model = _Models([objective.model for objective in self._objectives])

    @property
    def model(self) -> Any:
        return self._model

    def _of(self, record: Record, where: str) -> int:
        task = label_of(record, self._column, where)
        if task not in self._tasks:
            raise DataError(f"{where}: task {task!r} is not one of the training data's: {', '.join(self._tasks)}")
        return self._tasks.index(task)

    def fields(self, record: Record, where: str) -> dict[str, str]:
        return self._objectives[self._of(record, where)].fields(record, where)

    def encode(self, record: Record, where: str) -> Example:
        task = self._of(record, where)
        example = self._objectives[task].encode(record, where)
        group = task * (MAX_LABELS + 1) + 1 + example.group
        return replace(example, target=[task, *example.target], group=group)

    def measure(self, batch: Sequence[Example], shared: Any = None) -> Outcome:
        outcomes = []
        for task in sorted({example.target[0] for example in batch}):
            part = [replace(example, target=example.target[1:]) for example in batch if example.target[0] == task]
            self._model.soft.task = task
            outcomes.append(self._objectives[task].measure(part, shared[task] if shared else None))
        return Outcome(
            torch.stack([outcome.loss for outcome in outcomes]).sum(),
            sum(outcome.correct for outcome in outcomes),
            sum(outcome.count for outcome in outcomes),
        )

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        raise NotImplementedError("each task has its own golden example")

    def head(self) -> tuple[Head | None, Mapping[str, Array]]:
        return None, {}


def tune_tasks(
    base: Any,
    data: DataSource,
    *,
    output: str | os.PathLike[str],
    task_column: str,
    options: TuneOptions | None = None,
    progress: bool = True,
) -> dict[str, TuneResult]:
    """Train prompts for several tasks together, and write one prompt file for each.

    Args:
        base: as `tune`.
        data: records of all tasks.
        output: `NAME.safetensors`; the files are `NAME.TASK.safetensors`.
        task_column: the column that says which task a record belongs to.
        options: as `tune`; label words hold for every task that has the label.
        progress: whether to show progress on stderr: a bar on a terminal, else a line now and then.

    Returns:
        Task -> its prompt and the run's figures; the metric is over all tasks.

    Raises:
        DataError: fewer than two tasks, or what `tune` refuses of a task's data.
        InputError: options that several tasks cannot share.
    """
    options = replace(options or TuneOptions(), method="multitask-prompt-tuning")
    path = Path(output)
    if path.suffix != ".safetensors":
        raise InputError(f"output {str(path)!r} must end in .safetensors")
    if options.shots is not None or options.adapter is not None:
        raise InputError("--shots and --adapter are for one task at a time; leave them out with --task-column")
    sources = {task: _TaskRecords(data, task_column, task) for task in _task_names(data, task_column)}
    targets = {task: path.with_suffix(f".{task}.safetensors") for task in sources}
    check_outputs(targets.values(), path, base, data, options)
    check_inputs(base, data, options)
    facts = {task: inspect_data(records, _for_task(options, records)) for task, records in sources.items()}
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        runs: dict[str, Run] = {}
        for task, fact in facts.items():
            own = _for_task(options, sources[task])
            first = next(iter(runs.values()), None)
            runs[task] = (
                prepare(base, fact, own, num_tasks=len(facts))
                if first is None
                else another_task(replace(first, options=own), fact)
            )
        whole = replace(
            next(iter(runs.values())),
            objective=_Tasks({task: run.objective for task, run in runs.items()}, task_column),
            options=options,
        )
        found = read_data(whole, data, show=progress)
        loop, batches = make_loop(whole, found, path)
        if options.resume is not None:
            loop.resume(options.resume)
        done = loop.run(show=progress)
        results = {}
        with loop.kept():
            for index, (task, run) in enumerate(runs.items()):
                run.model.soft.task = index
                mine = read_data(run, sources[task])
                prompt = prompt_file(run, loop, done, targets[task], mine, show=progress)
                results[task] = TuneResult(
                    path=targets[task],
                    prompt=replace(prompt, name=task),
                    steps=done.step,
                    best_step=done.best_step,
                    metric=whole.objective.metric,
                    value=done.best.get(whole.objective.metric),
                    examples_per_second=done.step * batches.batch_size / done.seconds if done.seconds else 0.0,
                    checks={},
                    notes=found.notes,
                )
    if loop.accelerator.is_main_process:
        with loop.kept():
            for result in results.values():
                save_prompt(result.prompt, result.path)
    loop.forget_checkpoint()
    loop.accelerator.wait_for_everyone()
    return results


def _task_names(data: DataSource, column: str) -> list[str]:
    found: set[str] = set()
    for number, record in enumerate(read_records(data, columns=[column]), 1):
        found.add(label_of(record, column, f"row {number} of {source_name(data)!r}"))
        if len(found) > _MAX_TASKS:
            raise DataError(f"column {column!r} of {source_name(data)!r} names more than {_MAX_TASKS} tasks")
    broken = next((task for task in sorted(found) if not task.replace("-", "").replace("_", "").isalnum()), None)
    if broken is not None:
        raise DataError(f"task {broken!r} cannot name a file; use letters, digits, - and _")
    if len(found) < 2:
        raise DataError(f"column {column!r} of {source_name(data)!r} names one task only; leave out --task-column")
    return sorted(found)


def _for_task(options: TuneOptions, records: _TaskRecords) -> TuneOptions:
    """The options with the label words that this task's labels have."""
    if not options.verbalizer:
        return options
    labels = {label_of(record, options.label_column, f"row {number}") for number, record in enumerate(records, 1)}
    words = {label: choices for label, choices in options.verbalizer.items() if known_label(label, labels)}
    if not words:
        raise DataError(f"no label of {', '.join(sorted(labels)[:5])} has a verbalizer word; give one to every label")
    return replace(options, verbalizer=words)
