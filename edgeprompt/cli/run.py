"""`edgeprompt run`: answer texts with a package and its prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from edgeprompt.cli import console, ray, serving
from edgeprompt.cli.output import Lines, Table, kind_of, parquet_schema, table
from edgeprompt.errors import DataError, EdgePromptError, InputError
from edgeprompt.evaluation.rows import Answered, Form

if TYPE_CHECKING:
    from edgeprompt.evaluation.requests import Questions
    from edgeprompt.prompts.file import PromptFile
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
    "--prompts",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of prompt files, which --prompt-column names. May be repeated.",
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
    help="For a record that cannot be answered: end with exit code 1, leave it out, or say why in a column `error`. "
    "The default is stop, and record with --engine ray.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep answers in OUTPUT.part during the run, and continue there after an interruption.",
)
@click.option("--force", is_flag=True, help="Replace an output that edgeprompt run may not have written.")
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="ray: --input is a file or a folder, --output a folder of parts, and Ray's actors answer, one runtime each.",
)
@click.option("--address", help="Ray: the cluster, for example auto. Without it: this machine.")
@click.option(
    "--actors",
    metavar="N|MIN:MAX",
    help="Ray: how many actors, or the least and the most. Without it: from 1 to what the cluster has room for.",
)
@click.option(
    "--id-column",
    help="Ray, with --resume: a column whose values are all different. Without it: the file and the place in it.",
)
@click.option("--max-new-tokens", type=console.Whole(min=1))
@click.option("--temperature", type=console.Number(min=0), help="0 is greedy.")
@click.option("--top-k", type=console.Whole(min=1))
@click.option("--top-p", type=console.Number(min=0, max=1, min_open=True))
@click.option("--seed", type=console.Whole(min=0))
@click.option("--num-beams", type=console.Whole(min=1), default=1, help="Beam search (encoder-decoders).")
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
    folders: tuple[Path, ...],
    source: Path | None,
    text_column: str,
    prompt_column: str | None,
    out: Path | None,
    on_error: str | None,
    resume: bool,
    force: bool,
    engine: str,
    address: str | None,
    actors: str | None,
    id_column: str | None,
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
    if str(source) == "-":
        raise InputError("--input '-' is no file; pipe lines into stdin, without --input")
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
    if folders and not prompt_column:
        raise click.UsageError("--prompts needs --prompt-column, which names the prompt of each record")
    on_ray = engine == "ray"
    on_error = on_error or ("record" if on_ray else "stop")
    if not on_ray and (address or actors or id_column):
        raise click.UsageError("--address, --actors and --id-column need --engine ray")

    from edgeprompt.evaluation.requests import Questions, check_columns
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
    questions = Questions((), bool(folders), text_column, prompt_column, options, chat, truncate)
    if on_ray:
        if not source or not out or as_json or force:
            raise click.UsageError("--engine ray needs --input and a new --output, and has no --json")
        ray.answer_files(
            package, source, out, wanted, folders, questions, on_error=on_error, resume=resume, address=address,
            actors=actors, id_column=id_column, allow_base_mismatch=allow_base_mismatch, session=session,
        )  # fmt: skip
        return
    sources = (package, source, *wanted, *folders)
    if out:
        check_output(out, kind_of(out), force=force, sources=sources)
    for item in wanted:  # before the model is loaded, which takes seconds
        serving.find_prompt(package, item)
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise InputError(f"no folder of prompts at {str(missing)!r}")
    seen = _Seen(prompt_column)
    keep_broken = on_error != "stop"
    shared_columns: tuple[str, ...] = ()
    total = schema = None
    if source:
        total, shared_columns, schema = _count(source, out, seen, as_json=as_json, keep_broken=keep_broken)
    rows = _rows(texts, source, shared_columns, keep_broken=keep_broken)
    form = Form(as_json=as_json, named=len(wanted) > 1 or bool(prompt_column), with_errors=on_error == "record")
    failures = _Failures(on_error)
    with serving.open_runtime(package, **session) as runtime:
        prompts = serving.add_prompts(runtime, package, wanted, allow_base_mismatch=allow_base_mismatch)
        for folder in folders:
            runtime.add_folder(folder)
        questions = replace(questions, prompts=tuple(prompts))
        if source:
            check_columns(questions, seen.columns, runtime.describe, repr(str(source)), names=seen.names)
        single = len(texts) == 1 and len(prompts) <= 1
        if single and not out and not as_json and sys.stdout.isatty() and _generates(prompts):
            _, request = next(questions.of(next(rows), "row 1", runtime.describe))
            for piece in runtime.stream(request):
                click.echo(piece, nl=False)
            click.echo()
            return
        shared = {"on_error": on_error, "drafts": session["drafts"], "json": as_json}
        settings = serving.settings_of(package, source, wanted, folders, questions, **shared) if resume else ""
        form = replace(form, single=single)
        how = {"schema": schema, "resume": resume, "settings": settings, "force": force, "sources": sources}
        with _writer(out, form, **how) as writer:
            shown = console.track(rows, "run", total=total, start=writer.done)
            for answered, count in _answer(runtime, shown, questions, failures, writer.done):
                writer.write(answered, count)
    if failures.count:
        left = "left out" if on_error == "skip" else "recorded"
        console.note(f"note: {failures.count} answers failed and were {left}; the first: {failures.first}")


_MOST_NAMES = 1000
"""Different names of prompts that are looked at: a column of texts must not fill the memory."""


class _Seen:
    """The columns of an input, and the first names of prompts in it."""

    def __init__(self, prompt_column: str | None) -> None:
        self._prompt_column = prompt_column
        self.columns: dict[str, None] = {}
        self.names: dict[str, None] = {}

    def note(self, row: Mapping[str, Any]) -> None:
        """Look at a record."""
        from edgeprompt.evaluation.cells import text_of

        if not row.keys() <= self.columns.keys():
            self.columns |= dict.fromkeys(row)
        if self._prompt_column in row and len(self.names) < _MOST_NAMES:
            with suppress(DataError):  # its own row says so
                self.names[text_of(row, str(self._prompt_column), "")] = None


def _count(
    source: Path, out: Path | None, seen: _Seen, *, as_json: bool, keep_broken: bool
) -> tuple[int, tuple[str, ...], Any]:
    """How many records a file has, the columns that each must have in the output (none where they may differ), and the
    schema of the input's columns in a parquet output.

    The file is read to its end, so that what cannot be read or written is told before the work.

    Raises:
        DataError: a line is no record, or one that the output has no place for.
    """
    from edgeprompt.evaluation.formats import BrokenRecord, parquet_columns

    count = 0
    first: Mapping[str, Any] = {}
    suffix = out.suffix.lower() if out else ""
    same = suffix in (".csv", ".tsv") and not as_json

    def rows() -> Iterator[Mapping[str, Any]]:
        nonlocal count, first
        for count, row in enumerate(serving.read_texts(source, keep_broken=keep_broken), 1):
            if isinstance(row, BrokenRecord):
                continue
            first = first or row
            seen.note(row)
            if same and row.keys() != first.keys():
                raise DataError(f"row {count} has other columns than the first ({', '.join(first)}); write .jsonl")
            yield row

    schema = None
    if suffix == ".parquet":
        columns = parquet_columns(source) if source.suffix.lower() == ".parquet" and source.is_file() else None
        schema = parquet_schema(rows(), columns)
    else:
        for _ in rows():
            pass
    return count, tuple(first) if same else (), schema


def _rows(
    texts: tuple[str, ...], source: Path | None, columns: Sequence[str], *, keep_broken: bool
) -> Iterator[Mapping[str, Any]]:
    """What to answer; a line that is no record has the columns of the others."""
    from edgeprompt.evaluation.formats import BrokenRecord, read_lines

    def filled(row: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(row, BrokenRecord):
            row.update(dict.fromkeys(columns))
        return row

    if source:
        return map(filled, serving.read_texts(source, keep_broken=keep_broken))
    if texts:
        return ({"text": text} for text in texts)
    return read_lines(sys.stdin.buffer, "stdin")


def _generates(prompts: Mapping[str, PromptFile]) -> bool:
    return all(prompt.task == "generate" for prompt in prompts.values())


class _Failures:
    """What becomes of a record without an answer: `--on-error`."""

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self.count = 0
        self.first = ""

    def note(self, where: str, error: EdgePromptError) -> str | None:
        """The message to record; None leaves the record out.

        Raises:
            EdgePromptError: the error itself, where the first one ends the run.
        """
        from edgeprompt.evaluation.requests import told

        message = told(where, error)
        if self._on_error == "stop":
            raise type(error)(message) from error
        self.count += 1
        self.first = self.first or message
        return message if self._on_error == "record" else None


def _answer(
    runtime: Runtime, rows: Iterator[Mapping[str, Any]], questions: Questions, failures: _Failures, done: int
) -> Iterator[tuple[list[Answered], int]]:
    """Answers to each batch of records, in order, and how many records they were; memory holds one batch.

    `done` records at the start are passed over.
    """
    from edgeprompt.evaluation.requests import RECORDS_AT_ONCE, answer, batches

    numbered = ((f"row {number}", row) for number, row in enumerate(rows, 1))
    for batch in batches(islice(numbered, done, None), RECORDS_AT_ONCE):
        found = []
        for index, answered, error in answer(runtime, questions, batch):
            message = None if error is None else failures.note(batch[index][0], error)
            if error is None or message is not None:
                found.append(replace(answered, error=message))
        yield found, len(batch)


@contextmanager
def _writer(out: Path | None, form: Form, **how: Any) -> Iterator[Lines | Table]:
    if out is None:
        yield Lines(form)
        return
    with table(out, form, **how) as made:
        yield made
