"""`edgeprompt eval`: how good a prompt is on labelled data, on the package that serves it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprompt.cli import console, serving

if TYPE_CHECKING:
    from edgeprompt.metrics import Score
    from edgeprompt.prompt_file import PromptFile
    from edgeprompt.request import GenerationOptions, Request, Result
    from edgeprompt.runtime import Runtime

METRICS = ("accuracy", "f1", "exact-match", "rouge", "bleu", "mae")


@click.command("eval")
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("data")
@click.option(
    "--prompt",
    "wanted",
    multiple=True,
    required=True,
    metavar="FILE|NAME",
    help="Soft prompt: a file, or one inside the package; repeat it to compare several for one task.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    help="[default: accuracy for labels and tags, mae for numbers, f1 for qa, else rouge]",
)
@click.option("--text-column", default="text", show_default=True, help="Column that fills {text}.")
@click.option("--label-column", default="label", show_default=True, help="Column with the label (classify).")
@click.option("--target-column", default="target", show_default=True, help="Column with the right text (generate, qa).")
@click.option("--limit", type=click.IntRange(min=1), help="Look at the first rows only.")
@click.option("--zero-shot", is_flag=True, help="Compare with no prompt: the same template and label words.")
@click.option(
    "--hard-prompt",
    "hard",
    metavar="TEXT",
    callback=serving.unescape,
    help="Compare with TEXT in front instead of the soft prompt.",
)
@click.option("--shots", type=click.IntRange(min=1), help="Compare with this many solved examples in front.")
@click.option("--shots-from", metavar="DATA", help="Where --shots draws its examples (not the data evaluated on).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the --shots examples.")
@click.option("--max-new-tokens", type=click.IntRange(min=1))
@serving.runtime_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(
    package: Path,
    data: str,
    wanted: tuple[str, ...],
    metric: str | None,
    text_column: str,
    label_column: str,
    target_column: str,
    limit: int | None,
    zero_shot: bool,
    hard: str | None,
    shots: int | None,
    shots_from: str | None,
    seed: int,
    max_new_tokens: int | None,
    allow_base_mismatch: bool,
    provider: str,
    threads: int | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Evaluate prompts on DATA as PACKAGE serves them.

    Prints the metric with its standard error, and a table of labels. DATA is streamed; every prompt, and every
    baseline asked for, answers the same rows in mixed batches. A text that exceeds the context is cut. DATA has the
    columns that `tune` reads: tags are compared word by word, several labels of a row as a set.
    """
    if (shots is None) != (shots_from is None):
        raise click.UsageError("--shots and --shots-from go together")
    from edgeprompt.hard_prompt import few_shot_text, hard_prompt
    from edgeprompt.request import GenerationOptions

    columns = Columns(text_column, label_column, target_column)
    with serving.open_runtime(package, provider=provider, threads=threads, cache=cache) as runtime:
        prompts = serving.add_prompts(runtime, package, wanted, allow_base_mismatch=allow_base_mismatch)
        first = next(iter(prompts.values()))
        check_task(prompts, metric)
        baselines = [hard_prompt(first, "", name="zero-shot")] if zero_shot else []
        if hard is not None:
            baselines.append(hard_prompt(first, hard, name="hard prompt"))
        if shots and shots_from:
            text = few_shot_text(first, draw_shots(first, shots_from, columns, shots, seed))
            baselines.append(hard_prompt(first, text, name=f"{shots}-shot hard prompt"))
        for baseline in baselines:
            runtime.add_prompt(baseline, allow_base_mismatch=allow_base_mismatch)
            prompts[baseline.name] = baseline
        rows = console.track(islice(_read(data), limit), "eval", total=limit)
        options = GenerationOptions(max_new_tokens=max_new_tokens)
        found = evaluate(runtime, prompts, rows, columns, metric=metric, options=options)
    for name, score in found.items():
        if as_json:
            click.echo(json.dumps({"prompt": name, **dataclasses.asdict(score)}, ensure_ascii=False))
        else:
            show(name, score)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where in a row the text, the label and the right answer stand."""

    text: str = "text"
    label: str = "label"
    target: str = "target"

    def fields(self, prompt: PromptFile, row: Mapping[str, Any], number: int) -> dict[str, str]:
        """The template's slots; words to tag are joined by spaces."""
        from edgeprompt.data import tagged_words

        if prompt.task == "tag":
            (slot,) = prompt.template.slots
            return {slot: " ".join(tagged_words(row, f"row {number}")[0])}
        return serving.fields_of(row, self.text, prompt.template.slots, number)

    def references(self, prompt: PromptFile, row: Mapping[str, Any], number: int) -> list[Any]:
        """What is right: one text, or a tag for each word; several labels are one set.

        Raises:
            DataError: the column is missing, or a label is none of the prompt's.
        """
        from edgeprompt.data import given_answer, labels_of, tagged_words, text_of
        from edgeprompt.errors import DataError

        where = f"row {number}"
        if prompt.task == "qa" and row.get(self.target) is None:
            return [given_answer(row, self.fields(prompt, row, number)["context"], where)[0]]
        if prompt.task in ("generate", "qa"):
            return [text_of(row, self.target, where)]
        problem = prompt.head_spec.problem_type if prompt.head_spec else "single_label"
        if problem == "regression":
            return [text_of(row, self.label, where)]
        known = tuple(prompt.verbalizer) or prompt.labels
        if prompt.task == "tag":
            found = tagged_words(row, where)[1]
        elif problem == "multi_label":
            found = labels_of(row, self.label, where)
        else:
            found = [text_of(row, self.label, where)]
        unknown = next((label for label in found if label not in known), None)
        if unknown is not None:
            raise DataError(f"{where}: label {unknown!r} is none that prompt {prompt.name!r} knows: {', '.join(known)}")
        return [frozenset(found)] if problem == "multi_label" else found


def evaluate(
    runtime: Runtime,
    prompts: Mapping[str, PromptFile],
    rows: Iterator[Mapping[str, Any]],
    columns: Columns,
    *,
    metric: str | None,
    options: GenerationOptions,
) -> dict[str, Score]:
    """The score of every prompt over the same rows; memory holds the short answers and one batch of texts."""
    from edgeprompt.metrics import default_metric, score
    from edgeprompt.request import Request

    said: dict[str, list[Any]] = {name: [] for name in prompts}
    right: list[Any] = []
    first = next(iter(prompts.values()))
    number = 0
    for batch in serving.batches(rows, serving.ROWS_AT_ONCE):
        requests = []
        for row in batch:
            number += 1
            right += columns.references(first, row, number)
            for name, prompt in prompts.items():
                fields = columns.fields(prompt, row, number)
                requests.append((number, Request(text=fields, prompt=name, options=options, truncate=True)))
        for (_, request), result in zip(requests, serving.answers(runtime, requests), strict=True):
            said[str(request.prompt)] += _said(prompts[str(request.prompt)], request, result)
    labels = first.task in ("classify", "tag") and not _is_regression(first)
    name = metric or ("mae" if _is_regression(first) else default_metric(first.task))
    return {prompt: score(name, guesses, right, labels=labels) for prompt, guesses in said.items()}


def check_task(prompts: Mapping[str, PromptFile], metric: str | None) -> None:
    """Refuse, before any work, what cannot be compared.

    Raises:
        InputError: prompts of different tasks, or a metric that does not fit.
        UnsupportedError: a task without a metric here.
    """
    from edgeprompt.errors import InputError, UnsupportedError

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
            raise InputError(
                f"metric {metric} does not fit {_kind(task, several, numbers)}; take {' or '.join(needed)}"
            )


def _kind(task: str, several: bool, numbers: bool) -> str:
    return "several labels" if several else "numbers" if numbers else f"task {task}"


def _is_regression(prompt: PromptFile) -> bool:
    return prompt.head_spec is not None and prompt.head_spec.problem_type == "regression"


def draw_shots(
    prompt: PromptFile, source: str, columns: Columns, count: int, seed: int
) -> Sequence[tuple[Mapping[str, str], str]]:
    """`count` solved examples drawn by the seed, labels as equally many as can be, in one pass over the data."""
    by_label: dict[str, list[tuple[Mapping[str, str], str]]] = {}
    seen: dict[str, int] = {}
    draw = random.Random(seed)
    for number, row in enumerate(_read(source), 1):
        (answer,) = columns.references(prompt, row, number)
        kind = answer if prompt.task == "classify" else ""
        kept = by_label.setdefault(kind, [])
        seen[kind] = seen.get(kind, 0) + 1
        # Reservoir sampling (Vitter 1985): every row is equally likely to stay, without holding the data.
        place = len(kept) if len(kept) < count else draw.randrange(seen[kind])
        if place < count:
            kept[place : place + 1] = [(columns.fields(prompt, row, number), answer)]
    groups = [by_label[kind] for kind in sorted(by_label)]
    turns = [group[place] for place in range(count) for group in groups if place < len(group)]
    picked = turns[:count]
    draw.shuffle(picked)
    return picked


def _read(source: str) -> Iterator[Mapping[str, Any]]:
    from edgeprompt.data import read_rows

    return read_rows(source)


def _said(prompt: PromptFile, request: Request, result: Result) -> list[Any]:
    """What was answered, as `Columns.references` has it."""
    from edgeprompt.encoder_text import words_of
    from edgeprompt.request import Answer, Classification, Generation, Tagging

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


def show(name: str, score: Score) -> None:
    """A score on stdout."""
    value, error = score.value, score.standard_error
    shown = f"{value:.4g} ± {error:.2g}" if score.metric == "mae" else f"{100 * value:.1f} ± {100 * error:.1f}"
    click.echo(f"{name}: {score.metric} {shown} (n = {score.n})")
    if score.per_label:
        width = max(len(label) for label in (*score.per_label, "label")) + 2
        click.echo(f"  {'label':<{width}}precision  recall     f1       n")
    for label, found in score.per_label.items():
        cells = "".join(f"{100 * value:<11.1f}" for value in (found.precision, found.recall))
        click.echo(f"  {label:<{width}}{cells}{100 * found.f1:<9.1f}{found.n}")
