"""What `run` and `eval` share: opening a runtime with prompts, reading rows, asking in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeprompt.errors import EdgePromptError, InputError

if TYPE_CHECKING:
    from edgeprompt.prompt_file import PromptFile
    from edgeprompt.request import Request, Result
    from edgeprompt.runtime import Runtime

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

ROWS_AT_ONCE = 64


def runtime_options(command: F) -> F:
    """The options of every command that serves."""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="intra_op_num_threads of the session."),
        click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True),
    ):
        command = option(command)
    return command


@contextmanager
def open_runtime(package: Path, *, provider: str, threads: int | None) -> Iterator[Runtime]:
    """A runtime over a package, closed at the end."""
    import edgeprompt

    runtime = edgeprompt.load(package, provider=provider, threads=threads)
    try:
        yield runtime
    finally:
        runtime.close()


def find_prompt(package: Path, wanted: str) -> PromptFile:
    """A prompt by FILE, or by the NAME of one that travels in the package.

    Raises:
        InputError: neither; names those in the package.
    """
    from edgeprompt.package import open_package
    from edgeprompt.prompt_file import load_prompt

    if Path(wanted).is_file():
        return load_prompt(wanted)
    inside = {path.stem: path for path in open_package(package).prompt_paths}
    if wanted in inside:
        return load_prompt(inside[wanted])
    known = f"in the package: {', '.join(sorted(inside))}" if inside else "the package holds none"
    raise InputError(f"no prompt file {wanted!r} and no prompt of that name ({known})")


def add_prompts(runtime: Runtime, package: Path, wanted: Sequence[str]) -> dict[str, PromptFile]:
    """Load prompts into the runtime; name -> prompt, in the order given.

    Raises:
        InputError: two prompts of one name.
    """
    prompts: dict[str, PromptFile] = {}
    for item in wanted:
        prompt = find_prompt(package, item)
        if prompt.name in prompts:
            raise InputError(f"two prompts are called {prompt.name!r}; give one, or tune the other under another name")
        runtime.add_prompt(prompt)
        prompts[prompt.name] = prompt
    return prompts


def read_texts(source: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a data file; of a .txt file the lines, as `text`."""
    from edgeprompt.data import read_rows

    if source.suffix.lower() == ".txt":
        with source.open(encoding="utf-8-sig") as file:
            yield from read_lines(file, str(source))
    else:
        yield from read_rows(source)


def read_lines(file: Iterable[str], name: str) -> Iterator[Mapping[str, Any]]:
    """Each line of a text file as a row with the column `text`.

    Raises:
        DataError: no line, or no UTF-8.
    """
    from edgeprompt.errors import DataError

    count = 0
    try:
        for line in file:
            count += 1
            yield {"text": line.rstrip("\n")}
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason} behind line {count})") from error
    if not count:
        raise DataError(f"{name} is empty: it has no line")


def fields_of(row: Mapping[str, Any], column: str, slots: Sequence[str], number: int) -> dict[str, str]:
    """The slots' texts of a row; `column` fills `{text}`.

    Raises:
        DataError: a column is missing or holds no text.
    """
    from edgeprompt.data import text_of

    return {slot: text_of(row, column if slot == "text" else slot, f"row {number}") for slot in slots}


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def answers(runtime: Runtime, requests: Sequence[tuple[int, Request]]) -> list[Result]:
    """Answer one mixed batch; a row that fails is named by its number.

    Raises:
        EdgePromptError: of the first row that failed.
    """
    results = runtime.run([request for _, request in requests], return_errors=True)
    for (number, _), result in zip(requests, results, strict=True):
        if isinstance(result, EdgePromptError):
            raise type(result)(f"row {number}: {result}") from result
        if isinstance(result, BaseException):
            raise result
    return list(results)
