"""Progress and notes on stderr."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from edgeprompt import progress
from edgeprompt.errors import InputError

T = TypeVar("T")


class Number(click.FloatRange):
    """A number in a range; `nan` and `inf`, which no comparison catches, are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `FloatRange`."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found} is no finite number.", param, ctx)
        return found


class Whole(click.IntRange):
    """A whole number in a range; none that is larger than any count can be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `IntRange`."""
        found = super().convert(value, param, ctx)
        if found > sys.maxsize:
            self.fail(f"{found} is larger than {sys.maxsize}.", param, ctx)
        return found


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


@contextmanager
def stages(title: str) -> Iterator[Callable[[str, float], None]]:
    """Progress of work that reports (stage, fraction of the whole done).

    >>> with stages("export") as tell:
    ...     tell("quantise", 0.5)
    """
    with progress.show(title, 1.0) as update:
        yield lambda stage, done: update(done, stage)


def track(items: Iterable[T], title: str, *, total: int | None = None, start: int = 0) -> Iterator[T]:
    """Pass `items` on and count them; without `total` the count and the time alone are shown.

    The first `start` were done before.
    """
    with progress.show(title, total, start=start, unit="rows") as update:
        for done, item in enumerate(items, 1):
            yield item
            if done > start:
                update(done, "")


def need_stdout() -> None:
    """Refuse work whose answer would go to a closed stdout.

    Raises:
        InputError: stdout is closed.
    """
    if _Closed.seen:
        raise InputError("stdout is closed, so the answer would be lost; leave stdout open, or write to a file")


def as_json(value: Any) -> str:
    """JSON for stdout: as text where stdout holds all of Unicode, else with escapes."""
    return json.dumps(value, ensure_ascii=not holds_unicode(), default=str)


def printable(text: str) -> str:
    """A name or label of a file as people read it: quoted where spaces at its ends, lines or controls would mislead.

    What a terminal would act on, or that changes the order of letters, is written as an escape.
    """
    plain = text.replace("\n", "").isprintable()
    return text if plain and "\n" not in text and text == text.strip() else json.dumps(text, ensure_ascii=not plain)


def holds_unicode() -> bool:
    """Whether stdout can write every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return bool(codecs.lookup(encoding).name.startswith("utf"))


def write_exactly() -> None:
    """From here on a character that stdout cannot write is an error, as answers need it: none is changed."""
    _on_unwritable("strict")


def _on_unwritable(errors: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=errors)


class _Closed:
    """Whether stdout was closed when the process began."""

    seen = False


def open_streams() -> None:
    """Put something harmless where a standard stream is closed, before files are opened.

    A file that took the number of a closed stream would be written into by whatever prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one, since those below are open.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    _on_unwritable("backslashreplace")  # a report is better with an escape than not at all
    _Closed.seen = sys.stdout is None
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def quiet_libraries() -> None:
    """Keep the libraries' own bars and chatter off the terminal; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every retry
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What transformers and PEFT say to each other of coming versions.
    warnings.filterwarnings("ignore", category=FutureWarning)


def print_measured(measured: Mapping[str, Any], prefix: str = "") -> None:
    """Measured values on stdout, one a line; inner ones as `outer.inner`."""
    for key, value in measured.items():
        if isinstance(value, Mapping):
            print_measured(value, f"{prefix}{key}.")
        else:
            click.echo(f"  {prefix}{key}: {f'{value:.6g}' if isinstance(value, float) else value}")
