"""Progress and notes on stderr; progress is silent where stderr is no terminal."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


@contextmanager
def stages(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar for work that reports (stage, fraction of the whole done).

    >>> with stages("export") as tell:
    ...     tell("quantise", 0.5)
    """
    with _bar(counts=False) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda stage, done: bar.update(task, completed=done, description=f"{title}: {stage}")


def track(items: Iterable[T], title: str, *, total: int | None = None) -> Iterator[T]:
    """Pass `items` on and count them; without `total` the bar shows the count and the time alone."""
    with _bar(counts=True) as bar:
        task = bar.add_task(title, total=total)
        for item in items:
            yield item
            bar.advance(task)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and chatter off the terminal; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every retry
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What transformers and PEFT say to each other of coming versions.
    warnings.filterwarnings("ignore", category=FutureWarning)


def stderr_console() -> Console:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True)


def _bar(*, counts: bool) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} rows/s" if speed < 100 else f"{speed:.0f} rows/s")

    console = stderr_console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *((MofNCompleteColumn(), RateColumn()) if counts else (TaskProgressColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # else answers for a pipe would go to stderr
        transient=True,
    )


def print_measured(measured: Mapping[str, Any], prefix: str = "") -> None:
    """Measured values on stdout, one a line; inner ones as `outer.inner`."""
    for key, value in measured.items():
        if isinstance(value, Mapping):
            print_measured(value, f"{prefix}{key}.")
        else:
            click.echo(f"  {prefix}{key}: {f'{value:.6g}' if isinstance(value, float) else value}")
