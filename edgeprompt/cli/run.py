"""`edgeprompt run`: answer texts with a package and its prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from edgeprompt.cli import console, serving
from edgeprompt.cli.output import Answered, Form, Lines, Table, kind_of, table
from edgeprompt.errors import EdgePromptError, InputError
from edgeprompt.evaluation.requests import RECORDS_AT_ONCE, batches, fields_of

if TYPE_CHECKING:
    from edgeprompt.prompts.file import PromptFile
    from edgeprompt.request import GenerationOptions, Request
    from edgeprompt.runtime import Runtime


@click.command("run")
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--prompt",
    "wanted",
    multiple=True,
    metavar="FILE|NAME",
    help="Soft prompt: a file, or the name of one in the package. Repeat it to answer every text with each. "
    "Without it: the base model.",
)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help="Texts from a .csv, .tsv, .jsonl, .parquet (by column) or .txt (by line) file, streamed.",
)
@click.option("--text-column", default="text", show_default=True, help="Column of --input that fills {text}.")
@click.option("--prompt-column", help="Column of --input that names the prompt of each record.")
@click.option(
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="Write to this file instead of stdout, whole or not at all: .jsonl, .csv, .tsv, .parquet (with the columns "
    "of --input; a column with the name of a result column becomes input_NAME) or text.",
)
@click.option(
    "--on-error",
    type=click.Choice(("stop", "skip", "record")),
    default="stop",
    show_default=True,
    help="For a record that cannot be answered: end with exit code 1, leave it out, or say why in a column `error`.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep answers in OUTPUT.part during the run, and continue there after an interruption.",
)
@click.option("--force", is_flag=True, help="Replace an output that edgeprompt run may not have written.")
@click.option("--max-new-tokens", type=click.IntRange(min=1))
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1))
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--num-beams", type=click.IntRange(min=1), default=1, help="Beam search (encoder-decoders).")
@click.option(
    "--stop",
    multiple=True,
    callback=serving.unescape,
    help=r"Text that ends the answer, for example \n; may be repeated.",
)
@click.option("--chat", is_flag=True, help="Put each text into the package's chat template.")
@click.option("--truncate", is_flag=True, help="Cut a text that exceeds the context, instead of rejecting it.")
@serving.runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line, with scores and timings.")
def command(
    package: Path,
    texts: tuple[str, ...],
    wanted: tuple[str, ...],
    source: Path | None,
    text_column: str,
    prompt_column: str | None,
    out: Path | None,
    on_error: str,
    resume: bool,
    force: bool,
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
    as_json: bool,
    **session: Unpack[serving.SessionOptions],
) -> None:
    """Answer each TEXT, record of --input, or line of stdin.

    The answer to one TEXT is printed as it is, and streamed to a terminal. Several answers are printed one per line.
    """
    if texts and source:
        raise click.UsageError("give TEXT or --input, not both")
    if resume and not (source and out):
        raise click.UsageError("--resume needs --input and --output")
    if not out:
        console.need_stdout()
        console.write_exactly()
    if not texts and not source and sys.stdin is None:
        raise InputError("stdin is closed; give TEXT or --input FILE")
    if not texts and not source and sys.stdin.isatty():
        raise click.UsageError("give TEXT, --input FILE, or lines on stdin")
    if prompt_column and not source:
        raise click.UsageError("--prompt-column needs --input")

    from edgeprompt.package.outputs import check_output
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
        check_output(out, kind_of(out), force=force, sources=sources)
    for item in wanted:  # before the model is loaded, which takes seconds
        serving.find_prompt(package, item)
    if source and source.suffix.lower() == ".txt":
        serving.check_text(source)
    elif source:
        next(serving.read_texts(source))
    rows = _rows(texts, source)
    form = Form(as_json=as_json, named=len(wanted) > 1 or bool(prompt_column), with_errors=on_error == "record")
    failures = _Failures(on_error)
    with serving.open_runtime(package, **session) as runtime:
        prompts = serving.add_prompts(runtime, package, wanted, allow_base_mismatch=allow_base_mismatch)
        ask = _asker(prompts, options, text_column, prompt_column, chat=chat, truncate=truncate)
        single = len(texts) == 1 and len(prompts) <= 1
        if single and not out and not as_json and sys.stdout.isatty() and _generates(prompts):
            _, request = next(ask(1, next(rows)))
            for piece in runtime.stream(request):
                click.echo(piece, nl=False)
            click.echo()
            return
        settings = _settings(
            package, source, wanted, options=options, text_column=text_column, prompt_column=prompt_column, chat=chat,
            truncate=truncate, on_error=on_error,
        ) if resume else ""  # fmt: skip
        form = replace(form, single=single)
        with _writer(out, form, resume=resume, settings=settings, force=force, sources=sources) as writer:
            for answered, count in _answer(runtime, _progress(rows, source, writer.done), ask, failures, writer.done):
                writer.write(answered, count)
    if failures.count:
        left = "left out" if on_error == "skip" else "recorded"
        console.note(f"note: {failures.count} answers failed and were {left}; the first: {failures.first}")


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


class _Failures:
    """What becomes of a record without an answer: `--on-error`."""

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self.count = 0
        self.first = ""

    def note(self, number: int, error: EdgePromptError) -> str | None:
        """The message to record; None leaves the record out.

        Raises:
            EdgePromptError: the error itself, where the first one ends the run.
        """
        row = f"row {number}"
        message = str(error) if str(error).startswith(row) else f"{row}: {error}"
        if self._on_error == "stop":
            raise type(error)(message) from error
        self.count += 1
        self.first = self.first or message
        return message if self._on_error == "record" else None


def _answer(
    runtime: Runtime, rows: Iterator[Mapping[str, Any]], ask: Asker, failures: _Failures, done: int
) -> Iterator[tuple[list[Answered], int]]:
    """Answers to each batch of records, in order, and how many records they were; memory holds one batch.

    `done` records at the start are passed over.
    """
    number = done
    for batch in batches(islice(rows, done, None), RECORDS_AT_ONCE):
        asked: list[tuple[int, Mapping[str, Any], str, Request | EdgePromptError]] = []
        for record in batch:
            number += 1
            try:
                asked += [(number, record, text, request) for text, request in ask(number, record)]
            except EdgePromptError as error:
                asked.append((number, record, "", error))
        wanted = [request for *_, request in asked if not isinstance(request, EdgePromptError)]
        results = iter(runtime.run(wanted, return_errors=True))
        found = []
        for place, record, text, request in asked:
            result = request if isinstance(request, EdgePromptError) else next(results)
            prompt = None if isinstance(request, EdgePromptError) else request.prompt
            if isinstance(result, EdgePromptError):
                message = failures.note(place, result)
                if message is not None:
                    found.append(Answered(record, text, prompt, None, message))
            elif isinstance(result, BaseException):
                raise result
            else:
                found.append(Answered(record, text, prompt, result))
        yield found, len(batch)


def _progress(rows: Iterator[Mapping[str, Any]], source: Path | None, done: int) -> Iterator[Mapping[str, Any]]:
    return console.track(rows, "run", total=serving.count_records(source) if source else None, start=done)


@contextmanager
def _writer(
    out: Path | None, form: Form, *, resume: bool, settings: str, force: bool, sources: tuple[object, ...]
) -> Iterator[Lines | Table]:
    if out is None:
        yield Lines(form)
        return
    with table(out, form, resume=resume, settings=settings, force=force, sources=sources) as made:
        yield made


def _settings(package: Path, source: Path | None, wanted: Sequence[str], **options: Any) -> str:
    """What a resumed run must share with the one that it goes on from."""
    from edgeprompt.package.files import sha256_file
    from edgeprompt.package.folder import open_package

    manifest = open_package(package).manifest
    file = None if source is None else [source.name, source.stat().st_size]
    known = [sha256_file(serving.find_prompt(package, item)) for item in wanted]
    weights = manifest.weights_hash
    return json.dumps({"input": file, "weights": weights, "prompts": known, **options}, sort_keys=True, default=str)
