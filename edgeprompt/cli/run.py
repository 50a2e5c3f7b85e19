"""`edgeprompt run`: answer texts with a package and its prompts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgeprompt.cli import console, serving
from edgeprompt.evaluation.requests import RECORDS_AT_ONCE, answers, batches, fields_of

if TYPE_CHECKING:
    from edgeprompt.prompts.file import PromptFile
    from edgeprompt.request import GenerationOptions, Request, Result
    from edgeprompt.runtime import Runtime

Row = tuple[str, str | None, Any]
"""(text, prompt, result)"""


@click.command("run")
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--prompt",
    "wanted",
    multiple=True,
    metavar="FILE|NAME",
    help="Soft prompt: a file, or one inside the package. Repeated: every text is answered by each. "
    "None: the bare base.",
)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help="Texts from a .csv, .tsv, .jsonl, .parquet (by column) or .txt (by line) file, streamed.",
)
@click.option("--text-column", default="text", show_default=True, help="Column of --input that fills {text}.")
@click.option("--prompt-column", help="Column of --input that names the prompt of each row.")
@click.option(
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="Write here instead of stdout, whole or not at all: .jsonl, .csv, .tsv or text.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1))
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1))
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--num-beams", type=click.IntRange(min=1), default=1, help="Beam search (encoder-decoders).")
@click.option(
    "--stop", multiple=True, callback=serving.unescape, help=r"Text that ends the answer, as \n; may be repeated."
)
@click.option("--chat", is_flag=True, help="Put each text into the package's chat template.")
@click.option("--truncate", is_flag=True, help="Cut a text that exceeds the context, instead of refusing it.")
@serving.runtime_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with scores and timings.")
def command(
    package: Path,
    texts: tuple[str, ...],
    wanted: tuple[str, ...],
    source: Path | None,
    text_column: str,
    prompt_column: str | None,
    out: Path | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    num_beams: int,
    stop: tuple[str, ...],
    chat: bool,
    truncate: bool,
    allow_base_mismatch: bool,
    provider: str,
    threads: int | None,
    lanes: int | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Answer each TEXT, row of --input, or line of stdin.

    With one TEXT the answer is printed as it is, and streamed to a terminal; otherwise one line an answer.
    """
    if texts and source:
        raise click.UsageError("give TEXT or --input, not both")
    if not texts and not source and sys.stdin.isatty():
        raise click.UsageError("give TEXT, --input FILE, or lines on stdin")
    if prompt_column and not source:
        raise click.UsageError("--prompt-column needs --input")

    from edgeprompt.package.outputs import TEXT, check_output
    from edgeprompt.request import GenerationOptions

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        num_beams=num_beams,
    )
    sources = (package, source, *wanted)
    if out:
        check_output(out, TEXT, sources=sources)
    rows = _rows(texts, source)
    with serving.open_runtime(package, provider=provider, threads=threads, lanes=lanes, cache=cache) as runtime:
        prompts = serving.add_prompts(runtime, package, wanted, allow_base_mismatch=allow_base_mismatch)
        ask = _asker(prompts, options, text_column, prompt_column, chat=chat, truncate=truncate)
        single = len(texts) == 1 and len(prompts) <= 1
        if single and not out and not as_json and sys.stdout.isatty() and _generates(prompts):
            _, request = next(ask(1, next(rows)))
            for piece in runtime.stream_request(request):
                click.echo(piece, nl=False)
            click.echo()
            return
        with _writer(
            out, sources=sources, as_json=as_json, named=len(prompts) > 1 or bool(prompt_column), single=single
        ) as write:
            for answer in _answer(runtime, console.track(rows, "run"), ask):
                write(answer)


def _rows(texts: tuple[str, ...], source: Path | None) -> Iterator[Mapping[str, Any]]:
    from edgeprompt.evaluation.formats import read_lines

    if source:
        return serving.read_texts(source)
    if texts:
        return ({"text": text} for text in texts)
    return read_lines(sys.stdin.buffer, "stdin")


Asker = Callable[[int, Mapping[str, Any]], "Iterator[tuple[str, Request]]"]


def _asker(
    prompts: Mapping[str, PromptFile],
    options: GenerationOptions,
    text_column: str,
    prompt_column: str | None,
    *,
    chat: bool,
    truncate: bool,
) -> Asker:
    """A function from a numbered row to its requests, each with the text to show for it."""
    from edgeprompt.errors import DataError
    from edgeprompt.evaluation.cells import text_of
    from edgeprompt.request import Request

    def ask(number: int, row: Mapping[str, Any]) -> Iterator[tuple[str, Request]]:
        chosen: tuple[str | None, ...] = tuple(prompts) or (None,)
        if prompt_column:
            name = text_of(row, prompt_column, f"row {number}")
            if name not in prompts:
                raise DataError(f"row {number} names prompt {name!r}; given with --prompt: {', '.join(prompts)}")
            chosen = (name,)
        for pick in chosen:
            fields = fields_of(row, text_column, None if pick is None else prompts[pick], f"row {number}")
            text = fields["text"] if pick is None else fields
            request = Request(text=text, prompt=pick, options=options, chat=chat, truncate=truncate)
            yield " ".join(fields.values()), request

    return ask


def _generates(prompts: Mapping[str, PromptFile]) -> bool:
    return all(prompt.task == "generate" for prompt in prompts.values())


def _answer(runtime: Runtime, rows: Iterator[Mapping[str, Any]], ask: Asker) -> Iterator[Row]:
    """(text, prompt, result) of every request, in order; memory holds one batch."""
    number = 0
    for batch in batches(rows, RECORDS_AT_ONCE):
        asked = []
        for row in batch:
            number += 1
            asked += [(number, text, request) for text, request in ask(number, row)]
        results = answers(runtime, [(place, request) for place, _, request in asked])
        yield from ((text, request.prompt, result) for (_, text, request), result in zip(asked, results, strict=True))


@contextmanager
def _writer(
    out: Path | None, *, sources: tuple[object, ...], as_json: bool, named: bool, single: bool
) -> Iterator[Callable[[Row], None]]:
    """A function that writes one answer; a file appears when all are written."""
    kind = out.suffix.lower() if out else ""
    if out is None:
        yield _lines(sys.stdout, as_json=as_json, named=named, single=single)
        return
    from edgeprompt.package.files import atomic_file
    from edgeprompt.package.outputs import TEXT

    with (
        atomic_file(out, TEXT, sources=sources) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        if kind in (".csv", ".tsv") and not as_json:
            yield _table(file, "," if kind == ".csv" else "\t")
        else:
            yield _lines(file, as_json=as_json or kind == ".jsonl", named=named, single=single)


def _lines(file: IO[str], *, as_json: bool, named: bool, single: bool) -> Callable[[Row], None]:
    from edgeprompt.request import as_json as plain

    def write(row: Row) -> None:
        text, prompt, result = row
        if as_json:
            found = plain(result)
            facts = found if isinstance(found, dict) else {"embedding": found}
            click.echo(json.dumps({"input": text, "prompt": prompt, **facts}, ensure_ascii=False), file=file)
            return
        answer, score = _shown(result)
        if not single:  # one line an answer
            answer = answer.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
        cells = [*([prompt or ""] if named else []), answer, *([score] if score else [])]
        click.echo("\t".join(cells), file=file)

    return write


def _table(file: IO[str], delimiter: str) -> Callable[[Row], None]:
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerow(("text", "prompt", "answer", "score"))

    def write(row: Row) -> None:
        text, prompt, result = row
        writer.writerow((text, prompt or "", *_shown(result)))

    return write


def _shown(result: Result) -> tuple[str, str]:
    """(answer, score) as text; the score is empty where there is none."""
    from edgeprompt.request import Answer, Classification, Generation, Tagging, as_json

    match result:
        case Classification():
            return result.label, f"{result.scores[result.label]:.4f}" if result.label in result.scores else ""
        case Generation():
            return result.text, ""
        case Answer():
            return result.text, f"{result.score:.4f}"
        case Tagging():
            return ", ".join(f"{span.label}:{span.text}" for span in result.spans), ""
        case _:
            return json.dumps(as_json(result)), ""
