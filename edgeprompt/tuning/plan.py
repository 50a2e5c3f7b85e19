"""What the data asks for: task, labels, template and verbalizer, found in one pass before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprompt.data import DataSource, column_names, read_rows, source_name, text_of
from edgeprompt.errors import DataError, InputError
from edgeprompt.template import Template, VirtualTokens
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.soft_prompt import PREFIX_METHODS

_MAX_LABELS = 1000
_TASK_COLUMNS = {
    "tag": ("tokens", "tags"),
    "qa": ("question", "context", "answers"),
}


@dataclass(frozen=True)
class TaskPlan:
    """A task, ready to be encoded."""

    task: str
    template: Template
    verbalizer: Mapping[str, tuple[str, ...]]
    purpose: str
    """One sentence that names the task, to start a prompt from."""


def make_plan(data: DataSource, options: TuneOptions) -> TaskPlan:
    """Find the task by the data's columns, check that they are there, and fill in what `options` leaves open.

    Raises:
        DataError: empty data, a missing column, or far too many labels.
        InputError: the options do not go together.
    """
    task = options.task or _task_of(data, options)
    default = "{text}\nLabel:" if task == "classify" else "{text}\n"
    template = _place_prompt(Template.parse(options.template or default), options)
    if task == "generate" and options.verbalizer:
        raise InputError("a verbalizer is for --task classify; generation learns the target column")
    if task != "classify":
        return TaskPlan(task, template, {}, "Answer as the examples do.")
    verbalizer = options.verbalizer or _own_words(data, options, template)
    if len(verbalizer) < 2:
        raise DataError(
            f"{source_name(data)!r} has one label only, {next(iter(verbalizer))!r}; classification needs two or more"
        )
    words = ", ".join(choices[0].strip() for choices in verbalizer.values())
    return TaskPlan(task, template, dict(verbalizer), f"Classify the text as one of: {words}.")


def _task_of(data: DataSource, options: TuneOptions) -> str:
    columns = column_names(data)
    for task, needed in _TASK_COLUMNS.items():
        if set(needed) <= set(columns):
            return task
    if options.label_column in columns:
        return "classify"
    if options.target_column in columns:
        return "generate"
    raise DataError(
        f"{source_name(data)!r} has neither a column {options.label_column!r} (to classify) nor "
        f"{options.target_column!r} (to generate); it has: {', '.join(columns)}; "
        "name yours with --label-column or --target-column"
    )


def _place_prompt(template: Template, options: TuneOptions) -> Template:
    if options.method in PREFIX_METHODS:
        return template.without_prompt()
    if any(isinstance(part, VirtualTokens) for part in template.parts):
        return template
    return Template((VirtualTokens(), *template.parts)).checked()


def _own_words(data: DataSource, options: TuneOptions, template: Template) -> dict[str, tuple[str, ...]]:
    """Every label as its own word, set off by a space where the template does not end with one."""
    labels: set[str] = set()
    for number, row in enumerate(read_rows(data, columns=[options.label_column]), 1):
        labels.add(text_of(row, options.label_column, f"row {number} of {source_name(data)!r}"))
        if len(labels) > _MAX_LABELS:
            raise DataError(
                f"column {options.label_column!r} of {source_name(data)!r} has more than {_MAX_LABELS} labels; "
                "for free text use --task generate with --target-column"
            )
    space = "" if str(template)[-1].isspace() else " "
    return {label: (space + label,) for label in sorted(labels)}
