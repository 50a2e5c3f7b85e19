"""What the data asks for, found in one pass before anything heavy is loaded, and what that means for a base."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeprompt import names
from edgeprompt.errors import DataError, InputError, UnsupportedError
from edgeprompt.evaluation.cells import (
    TAG_COLUMNS,
    given_answer,
    label_key,
    label_of,
    labels_of,
    number_of,
    tagged_words,
    text_of,
    value_of,
)
from edgeprompt.evaluation.data import DataSource, column_names, read_records, source_name
from edgeprompt.evaluation.formats import Record
from edgeprompt.prompts.template import Literal, Mask, Template, VirtualTokens
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.soft_prompt import PREFIX_METHODS

MAX_LABELS = 1000
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_TRUTH = ("true", "false")
_FRACTION = re.compile(r"[+-]?\d+\.\d*[1-9]\d*")


@dataclass(frozen=True)
class DataFacts:
    """What the data says by itself."""

    task: str
    labels: tuple[str, ...] = ()
    """All labels or tags, sorted."""
    problem_type: str = "single_label"
    has_no_answer: bool = False
    """Question answering: whether some questions have no answer."""


@dataclass(frozen=True)
class TaskPlan:
    """A task on a base, ready to be encoded."""

    task: str
    template: Template
    verbalizer: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    problem_type: str
    has_head: bool
    """Whether a head is trained along (encoders), else the base's own output layer answers."""
    generation: Mapping[str, bool]
    purpose: str
    """One sentence that names the task, to start a prompt from."""


def inspect_data(data: DataSource, options: TuneOptions) -> DataFacts:
    """Find the task by the data's columns, check that they are there, and collect the labels.

    Raises:
        DataError: empty data, a missing column, or far too many labels.
        InputError: the options do not go together.
    """
    task = options.task or _task_of(data, options)
    if task == "generate" and options.verbalizer:
        raise InputError("a verbalizer is for --task classify; generation learns the target column")
    if task == "tag":
        return DataFacts(task, _collect(data, lambda record, where: tagged_words(record, where)[1], options, None))
    if task == "qa":
        missing = False
        for number, record in enumerate(read_records(data, columns=["context"]), 1):
            where = f"row {number} of {source_name(data)!r}"
            missing |= not given_answer(record, text_of(record, "context", where), where)[0]
        return DataFacts(task, has_no_answer=missing)
    if task != "classify":
        return DataFacts(task)
    column = options.label_column
    first = value_of(next(read_records(data, columns=[column])), column, f"row 1 of {source_name(data)!r}")
    problem = options.problem_type or ("multi_label" if isinstance(first, (list, tuple)) else "single_label")
    if problem == "regression":
        for number, record in enumerate(read_records(data), 1):
            number_of(record, column, f"row {number} of {source_name(data)!r}")
        return DataFacts(task, (), problem)

    def labels(record: Record, where: str) -> list[str]:
        return labels_of(record, column, where) if problem == "multi_label" else [label_of(record, column, where)]

    if options.verbalizer:
        return DataFacts(task, tuple(options.verbalizer), problem)
    return DataFacts(task, _collect(data, labels, options, column), problem)


def make_plan(
    facts: DataFacts, options: TuneOptions, *, architecture: str, name: str, predicts_masks: bool
) -> TaskPlan:
    """Choose template, verbalizer or head for a base; `name` is what to call it, `predicts_masks` whether it is a
    masked language model.

    Raises:
        UnsupportedError: the base cannot do the task.
        InputError: the options do not go together.
    """
    encoder = architecture == names.ENCODER_ONLY
    if facts.task in ("tag", "qa") and not encoder:
        raise UnsupportedError(f"task {facts.task!r} needs an encoder-only base; {name} is {architecture}")
    if facts.task == "generate" and encoder:
        raise UnsupportedError(f"{name} is an encoder and does not generate; use --task classify, tag or qa")
    if facts.task == "embed":
        raise UnsupportedError("embeddings need no tuning; the runtime's embed pools the base's hidden states")
    template = Template.parse(options.template or _default_template(facts, encoder))
    has_mask = any(isinstance(part, Mask) for part in template.parts)
    has_head = encoder and not (facts.task == "classify" and has_mask)
    if has_head and options.verbalizer:
        raise InputError('label words on an encoder need a {mask} in the template, as "{prompt}{text} It was {mask}."')
    if encoder and not has_head and not predicts_masks:
        raise UnsupportedError(f"{name} is no masked language model, so it cannot fill {{mask}}; leave {{mask}} out")
    if options.method == "head" and not has_head:
        raise InputError("--method head trains a task head alone, and this task has none; choose a prompt")
    if facts.problem_type != "single_label" and not has_head:
        raise UnsupportedError(f"{facts.problem_type} classification needs a head, which encoder-only bases have")
    verbalizer: dict[str, tuple[str, ...]] = {}
    if facts.task == "classify" and not has_head:
        space = "" if str(template)[-1].isspace() else " "
        verbalizer = dict(options.verbalizer) or {label: (space + label,) for label in facts.labels}
    if facts.task == "classify" and facts.problem_type == "single_label" and len(facts.labels) < 2:
        source = "verbalizer names" if options.verbalizer else "data has"
        raise DataError(f"the {source} one label only, {facts.labels[0]!r}; classification needs two or more")
    return TaskPlan(
        task=facts.task,
        template=_place_prompt(template, options, architecture),
        verbalizer=verbalizer,
        labels=facts.labels,
        problem_type=facts.problem_type,
        has_head=has_head,
        generation={"allow_no_answer": True} if facts.has_no_answer else {},
        purpose=_purpose(facts, verbalizer),
    )


def _purpose(facts: DataFacts, verbalizer: Mapping[str, tuple[str, ...]]) -> str:
    if facts.task == "classify" and facts.labels:
        words = [choices[0].strip() for choices in verbalizer.values()] or list(facts.labels)
        return f"Classify the text as one of: {', '.join(words)}."
    return {"tag": "Label every word of the text.", "qa": "Find the answer in the context."}.get(
        facts.task, "Answer as the examples do."
    )


def _default_template(facts: DataFacts, encoder: bool) -> str:
    if facts.task == "qa":
        return "{prompt}{question}{context}"
    if encoder:
        return "{prompt}{text}"
    return "{prompt}{text}\nLabel:" if facts.task == "classify" else "{prompt}{text}\n"


def _task_of(data: DataSource, options: TuneOptions) -> str:
    columns = column_names(data)
    if "tokens" in columns and set(TAG_COLUMNS) & set(columns):
        return "tag"
    if {"question", "context"} <= set(columns) and {"answer", "answers"} & set(columns):
        return "qa"
    if options.label_column in columns:
        return "classify"
    if options.target_column in columns:
        return "generate"
    raise DataError(
        f"{source_name(data)!r} has neither a column {options.label_column!r} (to classify) nor "
        f"{options.target_column!r} (to generate); it has: {', '.join(columns)}; "
        "name yours with --label-column or --target-column"
    )


def _place_prompt(template: Template, options: TuneOptions, architecture: str) -> Template:
    if options.method == "head" or (options.method in PREFIX_METHODS and template.prompt_is_prefix):
        return template.without_prompt()
    if options.method in PREFIX_METHODS:
        places = sum(isinstance(part, VirtualTokens) for part in template.parts)
        if architecture != names.DECODER_ONLY or places > 1 or not isinstance(template.parts[-1], Literal):
            raise InputError(
                f"template {str(template)!r}: keys and values ({options.method}) stand in front of the text; write "
                "{prompt} first or leave it out. On a decoder they can stand in one place inside it, with fixed text "
                'at the end, as "{text}{prompt}\\nLabel:"'
            )
        if options.adapter is not None:
            raise UnsupportedError("PEFT has no adapter with keys and values inside the text; leave out --adapter")
    if any(isinstance(part, VirtualTokens) for part in template.parts):
        return template
    return Template((VirtualTokens(), *template.parts)).checked()


def _kind(label: object) -> str | None:
    """Whether a label of a typed file is a number, a list, a name, or true or false; None: it could be several."""
    if isinstance(label, bool):
        return "truth value"
    if isinstance(label, (int, float)):
        return "number"
    if isinstance(label, (list, tuple)):
        return "list"
    either = not isinstance(label, str) or _NUMBER.fullmatch(label.strip()) or label.strip().lower() in _TRUTH
    return None if either else "name"


def _collect(
    data: DataSource, read: Callable[[Record, str], list[str]], options: TuneOptions, column: str | None
) -> tuple[str, ...]:
    """All labels of the data, sorted; two that differ in nothing that can be seen, or in case alone, are refused.

    `column`: where labels stand whose types must agree; None: there is no such column.
    """
    labels: dict[str, str] = {}
    kinds: dict[str, object] = {}
    cases: dict[str, str] = {}
    for number, record in enumerate(read_records(data), 1):
        where = f"row {number} of {source_name(data)!r}"
        value = None if column is None else record.get(column)
        found = read(record, where)
        if (kind := _kind(value)) and (kind != "list" or options.problem_type is None):
            kinds.setdefault(kind, value)
        if other := next((name for name in kinds if kind and name != kind), None):
            raise DataError(
                f"{where}: label {value!r} is a {kind}, and an earlier row has the {other} {kinds[other]!r}; write all "
                f"labels as {'lists' if 'list' in kinds else 'names'}"
            )
        for label in found:
            if options.problem_type is None and _FRACTION.fullmatch(label):
                raise DataError(
                    f"{where}: label {label!r} is a number with a fraction; give --problem-type regression to learn "
                    "numbers, or --problem-type single_label if each is a class"
                )
            known = labels.setdefault(label_key(label), label)
            if known != label:
                raise DataError(f"{where}: label {label!r} stands for what an earlier row calls {known!r}; write one")
            if options.problem_type is None and (same := cases.setdefault(label.casefold(), label)) != label:
                raise DataError(
                    f"{where}: label {label!r} differs from {same!r} of an earlier row in case alone; write one, or "
                    "give --problem-type if each is a class of its own"
                )
        if len(labels) > MAX_LABELS:
            raise DataError(
                f"column {options.label_column!r} of {source_name(data)!r} has more than {MAX_LABELS} labels; "
                "for free text use --task generate with --target-column"
            )
    return tuple(sorted(labels.values()))
