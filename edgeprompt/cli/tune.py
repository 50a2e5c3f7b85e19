"""`edgeprompt tune`: from labelled data to a prompt file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprompt import names
from edgeprompt.cli import console
from edgeprompt.errors import DataError
from edgeprompt.package.files import read_regular
from edgeprompt.tuning.options import (
    ENCODERS,
    INITS,
    LOSSES,
    MAX_LENGTH,
    METHODS,
    PRECISIONS,
    Distillation,
    TuneOptions,
)

if TYPE_CHECKING:
    from edgeprompt.tuning import TuneResult


_MAX_INSTRUCTION = 1 << 20


def _verbalizer(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    words: dict[str, tuple[str, ...]] = {}
    for value in values:
        label, sign, word = value.partition("=")
        if not (label and sign and word):
            raise click.BadParameter(f'{value!r} is not of the form label=" word"')
        words[label] = (*words.get(label, ()), word)
    return words


def _templates(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_template(context, parameter, value) or "" for value in values)


def _template(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else value.replace("\\n", "\n").replace("\\t", "\t")


def _instruction(value: str | None) -> str | None:
    """The text, or with "@" in front what the file holds, without its last line's end."""
    if value is None or not value.startswith("@"):
        return value
    file = Path(value[1:])
    try:
        return read_regular(file, _MAX_INSTRUCTION).decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the instruction {str(file)!r} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read the instruction {str(file)!r}: {error.strerror or error}") from error


@click.command("tune")
@click.argument("base")
@click.argument("data")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Prompt file (.safetensors).")
@click.option("--method", type=click.Choice(METHODS), default="prompt-tuning", show_default=True)
@click.option("--encoder", type=click.Choice(ENCODERS), default="mlp", show_default=True, help="Network of p-tuning.")
@click.option("--projection", is_flag=True, help="Train a prefix behind a two-layer network.")
@click.option(
    "--task",
    type=click.Choice([task for task in names.TASKS if task != "embed"]),
    help="Default: by the columns of DATA.",
)
@click.option(
    "--problem-type",
    type=click.Choice(names.PROBLEM_TYPES),
    help="For classification with a head. Default: multi_label where labels are lists, else single_label.",
)
@click.option("--virtual-tokens", "num_virtual_tokens", type=console.Whole(1), default=16, show_default=True)
@click.option(
    "--init", type=click.Choice(INITS), default="text", show_default=True, help="Initial value of the prompt."
)
@click.option("--init-text", help="Text for --init text. Default: a sentence that names the label words.")
@click.option("--template", callback=_template, help=r'For example "{prompt}{text}\nSentiment:".')
@click.option(
    "--verbalizer",
    multiple=True,
    callback=_verbalizer,
    metavar="LABEL=WORD",
    help='Label word, as positive=" positive". Repeat it for each label, and for each word of a label.',
)
@click.option("--text-column", default="text", show_default=True)
@click.option("--label-column", default="label", show_default=True)
@click.option("--target-column", default="target", show_default=True)
@click.option(
    "--distil",
    metavar="TEXT|@FILE",
    callback=_template,
    help="Learn without labels to answer as BASE does when it reads this instruction, with {text} where DATA's text "
    "stands.",
)
@click.option("--chat", is_flag=True, help="Put the instruction into the base's chat template.")
@click.option("--shots-from", metavar="DATA", help="Where --distil takes --shots solved examples from.")
@click.option(
    "--shots-seed", type=console.Whole(0), help="Seed for drawing the --shots examples. Without it, --seed is used."
)
@click.option(
    "--balance-teacher",
    is_flag=True,
    help="Remove the teacher's constant preference for some labels from its answers. For labels that are about "
    "equally common.",
)
@click.option("--teacher", metavar="BASE", help="Another base that reads the instruction, instead of BASE.")
@click.option(
    "--teacher-prompt",
    type=click.Path(path_type=Path),
    help="Prompt file of --teacher: move it to BASE, instead of an instruction.",
)
@click.option(
    "--distil-loss",
    type=click.Choice(LOSSES),
    default="auto",
    show_default=True,
    help="Of free text: the teacher's distributions (one tokenizer), or its text.",
)
@click.option(
    "--label-weight",
    type=console.Number(0, 1),
    default=0.5,
    show_default=True,
    help="With --distil and --label-column: the share of cross-entropy where a text has a label.",
)
@click.option(
    "--temperature",
    type=console.Number(0),
    default=0.0,
    show_default=True,
    help="With --distil: samples the teacher's text; 0 is greedy.",
)
@click.option(
    "--max-new-tokens",
    type=console.Whole(1),
    default=64,
    show_default=True,
    help="With --distil: of an answer in free text.",
)
@click.option("--stop", multiple=True, callback=_templates, help="With --distil: text that ends the teacher's answer.")
@click.option(
    "--teacher-answers",
    type=click.Path(path_type=Path),
    help="With --distil: file that keeps the teacher's answers; without it OUTPUT.teacher.jsonl.",
)
@click.option(
    "--task-column", help="Column with the name of the task. Tasks are trained together; each gets a prompt file."
)
@click.option("--eval", "eval_data", metavar="DATA", help="Data that chooses the best prompt.")
@click.option(
    "--eval-split",
    type=console.Number(0, 1, max_open=True),
    help="Without --eval: fraction of DATA kept for evaluation. Default: 256 examples, or a fifth of DATA if that is "
    "fewer.",
)
@click.option(
    "--shots",
    type=console.Whole(1),
    help="Training examples per class. With --distil: solved examples for the teacher.",
)
@click.option("--steps", type=console.Whole(1), help="Training steps. Default: 200, unless --epochs is given.")
@click.option("--epochs", type=console.Number(0, min_open=True))
@click.option("--batch-size", type=console.Whole(1), default=16, show_default=True)
@click.option(
    "--lr", "learning_rate", type=console.Number(0, min_open=True), help="Learning rate. Default: by the method."
)
@click.option("--seed", type=console.Whole(0), default=0, show_default=True)
@click.option(
    "--max-length",
    type=console.Whole(2),
    default=MAX_LENGTH,
    show_default=f"{MAX_LENGTH}, or what the base takes",
    help="Tokens; longer texts are cut.",
)
@click.option("--mixed-precision", type=click.Choice(PRECISIONS), default="no", show_default=True)
@click.option(
    "--for",
    "package",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Package to tune for: train against its own weights, dequantised. Repeat it: one prompt for all of them.",
)
@click.option("--resume", type=click.Path(path_type=Path), help="Checkpoint to continue, or prompt file to start from.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder for the same prompt as a PEFT adapter.")
@click.option("--log", type=click.Path(path_type=Path), help="Folder for metrics.jsonl and TensorBoard events.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.pass_context
def command(
    context: click.Context,
    /,
    base: str,
    data: str,
    output: Path,
    task_column: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Train a soft prompt for BASE on DATA.

    BASE is a Hugging Face id, a local folder or a .gguf file; DATA is a .csv, .tsv, .jsonl or .parquet file or a
    dataset id (name:split). With --distil, DATA are texts without labels, also a .txt file with a text a line.
    """
    options = TuneOptions(**_with_teacher(context, values))
    if task_column is not None and options.distil is not None:
        raise click.UsageError("--task-column and --distil do not go together")
    console.quiet_libraries()
    from edgeprompt.tuning.files import check_inputs

    check_inputs(base, data, options)
    from edgeprompt.tuning import tune, tune_tasks

    if task_column is None:
        _tell(tune(base, data, output=output, options=options), as_json)
        return
    if options.method != "multitask-prompt-tuning":
        raise click.UsageError("--task-column is for --method multitask-prompt-tuning")
    for result in tune_tasks(base, data, output=output, task_column=task_column, options=options).values():
        _tell(result, as_json)


def _with_teacher(context: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options of `TuneOptions`; those of a teacher are one of them."""
    names = {
        "distil": "instruction", "chat": "chat", "shots_from": "shots_from", "shots_seed": "shots_seed",
        "teacher": "teacher", "teacher_prompt": "teacher_prompt", "distil_loss": "loss", "label_weight": "label_weight",
        "temperature": "temperature", "max_new_tokens": "max_new_tokens", "stop": "stop", "teacher_answers": "answers",
        "balance_teacher": "balance",
    }  # fmt: skip
    given = {name for name in names if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    asked = {new: values.pop(old) for old, new in names.items()}
    asked["instruction"] = _instruction(asked["instruction"])
    values["package"] = values["package"] or None
    if not given & {"distil", "teacher_prompt"}:
        if given:
            flag = "--" + sorted(given)[0].replace("_", "-")
            raise click.UsageError(f"{flag} is for --distil INSTRUCTION, or --teacher BASE --teacher-prompt FILE")
        return {**values, "distil": None}
    if context.get_parameter_source("label_column") is click.core.ParameterSource.COMMANDLINE:
        asked["label_column"] = values["label_column"]
    asked["shots"] = values.pop("shots") or 0
    return {**values, "shots": None, "distil": Distillation(**asked)}


def _tell(result: TuneResult, as_json: bool) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    for note in result.notes:
        console.note(f"note: {note}")
    facts: dict[str, Any] = {
        "path": str(result.path),
        "steps": result.steps,
        "best_step": result.best_step,
        f"eval_{result.metric}": result.value,
        "examples_per_second": round(result.examples_per_second, 2),
        **result.checks,
    }
    if as_json:
        click.echo(console.as_json(facts))
        return
    click.echo(f"{result.path}: {result.prompt.num_virtual_tokens} virtual tokens, {result.path.stat().st_size} bytes")
    console.print_measured({key: value for key, value in facts.items() if key != "path" and value is not None})
