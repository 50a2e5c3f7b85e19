"""`edgeprompt eval`: how good a prompt is on labelled data, on the package that serves it."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from edgeprompt.cli import console, serving

if TYPE_CHECKING:
    from edgeprompt.evaluation.metrics import Score

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
    help="Soft prompt: a file, or the name of one in the package. Repeat it to compare several for one task.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    help="[default: accuracy for labels and tags, mae for numbers, f1 for qa, else rouge]",
)
@click.option("--text-column", default="text", show_default=True, help="Column that fills {text}.")
@click.option("--label-column", default="label", show_default=True, help="Column with the label (classify).")
@click.option(
    "--target-column", default="target", show_default=True, help="Column with the reference text (generate, qa)."
)
@click.option("--limit", type=console.Whole(min=1), help="Evaluate only this many records, the first ones.")
@click.option("--zero-shot", is_flag=True, help="Compare with no prompt, with the same template and label words.")
@click.option(
    "--hard-prompt",
    "hard",
    metavar="TEXT",
    callback=serving.unescape,
    help="Compare with TEXT in place of the soft prompt.",
)
@click.option(
    "--teacher",
    is_flag=True,
    help="Compare with the instruction that the soft prompt was distilled from.",
)
@click.option(
    "--shots", type=console.Whole(min=1), help="Compare with this many solved examples in place of the soft prompt."
)
@click.option(
    "--shots-from", metavar="DATA", help="Data from which --shots draws its examples; use other data than DATA."
)
@click.option(
    "--seed", type=console.Whole(min=0), default=0, show_default=True, help="Seed for drawing the --shots examples."
)
@click.option("--max-new-tokens", type=console.Whole(min=1))
@serving.runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
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
    teacher: bool,
    shots: int | None,
    shots_from: str | None,
    seed: int,
    max_new_tokens: int | None,
    allow_base_mismatch: bool,
    as_json: bool,
    **session: Unpack[serving.SessionOptions],
) -> None:
    """Evaluate prompts on DATA as PACKAGE serves them.

    Prints the metric with its standard error, and a table with one line per label. DATA has the columns that `tune`
    reads, and is streamed. All prompts and baselines answer the same records, in mixed batches. A text that exceeds the
    context is cut. Tags are compared word by word. Several labels of a record are compared as a set.
    """
    if (shots is None) != (shots_from is None):
        raise click.UsageError("--shots and --shots-from go together")
    console.need_stdout()
    from edgeprompt.evaluation.data import column_names, read_records
    from edgeprompt.evaluation.evaluate import Columns, check_task, draw_shots, evaluate
    from edgeprompt.prompts.hard_prompt import few_shot_text, hard_prompt, teacher_prompt
    from edgeprompt.request import GenerationOptions

    columns = Columns(text_column, label_column, target_column)
    for source in (data, *([shots_from] if shots_from else [])):  # before the model is loaded, which takes seconds
        column_names(source)
    for item in wanted:
        serving.find_prompt(package, item)
    with serving.open_runtime(package, **session) as runtime:
        prompts = serving.add_prompts(runtime, package, wanted, allow_base_mismatch=allow_base_mismatch)
        first = next(iter(prompts.values()))
        check_task(prompts, metric)
        baselines = [hard_prompt(first, "", name="zero-shot")] if zero_shot else []
        if hard is not None:
            baselines.append(hard_prompt(first, hard, name="hard prompt"))
        if teacher:
            baselines.append(teacher_prompt(first, name="teacher's instruction"))
        if shots and shots_from:
            hard_prompt(first, "", name="")  # what has no counterpart in text is said before examples are drawn
            text = few_shot_text(first, draw_shots(first, shots_from, columns, shots, seed))
            baselines.append(hard_prompt(first, text, name=f"{shots}-shot hard prompt"))
        for baseline in baselines:
            runtime.add_prompt(baseline, allow_base_mismatch=allow_base_mismatch)
            prompts[baseline.name] = baseline
        rows = console.track(islice(read_records(data), limit), "eval", total=limit)
        options = GenerationOptions(max_new_tokens=max_new_tokens)
        found = evaluate(runtime, prompts, rows, columns, metric=metric, options=options)
    for name, score in found.items():
        if as_json:
            click.echo(console.as_json({"prompt": name, **dataclasses.asdict(score)}))
        else:
            show(name, score)


def show(name: str, score: Score) -> None:
    """A score on stdout."""
    value, error = score.value, score.standard_error
    shown = f"{value:.4g} ± {error:.2g}" if score.metric == "mae" else f"{100 * value:.1f} ± {100 * error:.1f}"
    cut = "" if score.tokenizer in ("", "words", "13a") else f", tokens: {score.tokenizer}"
    click.echo(f"{console.printable(name)}: {score.metric} {shown} (n = {score.n}{cut})")
    if score.per_label:
        width = max(len(console.printable(label)) for label in (*score.per_label, "label")) + 2
        click.echo(f"  {'label':<{width}}precision  recall     f1       n")
    for label, found in score.per_label.items():
        cells = "".join(f"{100 * value:<11.1f}" for value in (found.precision, found.recall))
        click.echo(f"  {console.printable(label):<{width}}{cells}{100 * found.f1:<9.1f}{found.n}")
