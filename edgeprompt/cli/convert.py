"""`edgeprompt convert`: other tools' prompts to prompt files, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click

from edgeprompt.cli import console
from edgeprompt.errors import InputError

# Written out, so that --help imports nothing; a test compares them with exporters.importers and exporters.convert.
FORMATS = ("auto", "peft", "openprompt", "p-tuning-v2", "t5x", "nemo", "trtllm", "vllm", "tgis")
TARGETS = ("auto", "prompt", "onnx-adapter", "npy", "peft", "trtllm", "kv")


@click.command(name="convert")
@click.argument("source", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="File or folder; the ending decides the format.")
@click.option("--from", "source_format", type=click.Choice(FORMATS), default="auto", show_default=True)
@click.option("--to", "target", type=click.Choice(TARGETS), default="auto", show_default=True)
@click.option("--base", help="The base model that the prompt was trained on, or its exported package (faster).")
@click.option("--task-index", metavar="N", help="One prompt of a file that holds several: index or name.")
@click.option("--template", help="Where prompt and text stand, for example '{prompt}{text}\\nSentiment:'.")
@click.option("--verbalizer", multiple=True, metavar="LABEL=WORD", help="A label word; repeat it for each.")
@click.option("--label", "labels", multiple=True, metavar="NAME", help="Class names, in order; repeat it for each.")
@click.option("--name", help="The prompt's name.  [default: from SOURCE]")
@click.option(
    "--kv-dtype",
    type=click.Choice(("float32", "float16")),
    help="For --to kv: type of the keys and values in the file.  [default: float32]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace an adapter folder that edgeprompt wrote, or a table or ONNX Runtime adapter of anybody.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    source: tuple[str, ...],
    output: str,
    source_format: str,
    target: str,
    base: str | None,
    task_index: str | None,
    template: str | None,
    verbalizer: tuple[str, ...],
    labels: tuple[str, ...],
    name: str | None,
    kv_dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE, a prompt of another tool or a prompt file.

    The ending of the output decides the format: .safetensors is a prompt file, .onnx_adapter an adapter for stock ONNX
    Runtime, .npy the bare tensor. A folder gets one prompt file per task, or a PEFT adapter with --to peft. Several
    SOURCEs make one table (--to trtllm).
    """
    if kv_dtype is not None and target != "kv":
        raise click.UsageError("--kv-dtype goes with --to kv")
    console.quiet_libraries()
    from exporters.convert import convert_prompt

    report = convert_prompt(
        list(source),
        output,
        source_format=source_format,
        target=target,
        base=base,
        template=template,
        verbalizer=parse_verbalizer(verbalizer),
        labels=labels,
        task_index=task_index,
        name=name,
        kv_dtype=kv_dtype or "float32",
        force=force,
    )
    if as_json:
        click.echo(console.as_json({**dataclasses.asdict(report), "outputs": [str(path) for path in report.outputs]}))
        return
    for kind, lines in (("found", report.found), ("dropped", report.dropped), ("note", report.notes)):
        for line in lines:
            click.echo(f"{kind}: {line}", err=True)
    for path in report.outputs:
        click.echo(str(path))


def parse_verbalizer(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`label=word` options as label -> words.

    Raises:
        InputError: one has no "=".
    """
    words: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        label, found, word = pair.partition("=")
        if not found or not label or not word:
            raise InputError(f"--verbalizer {pair!r} is not LABEL=WORD, for example positive=' positive'")
        words[label] = (*words.get(label, ()), word)
    return words
