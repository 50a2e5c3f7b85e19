"""Progress on stderr: a bar on a terminal; elsewhere (a log, a pipe, CI) a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

FIRST_S = 10.0
"""Work that takes less time says nothing off a terminal; the least time between two lines."""
SHARE = 0.1
"""Share of the work that is worth a line."""
LONGEST_S = 60.0
"""After this long a line comes even if less was done: somebody may wonder whether the work goes on."""

Update = Callable[[float, str], None]
"""Called with how much is done, and a note: the stage, or figures."""


@contextmanager
def show(title: str, total: float | None, *, start: float = 0, unit: str = "", wanted: bool = True) -> Iterator[Update]:
    """Show how far some work is.

    Args:
        title: What is done.
        total: How much it is; None: not known.
        start: How much was done before.
        unit: What is counted, as "rows"; "": `total` is 1, and shares are shown.
        wanted: False: show nothing.
    """
    from rich.console import Console

    console = Console(stderr=True) if wanted and sys.stderr is not None else None
    if console is not None and console.is_terminal:
        with _bar(console, unit) as bar:
            task = bar.add_task(title, total=total, note="")
            bar.update(task, completed=start)
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    lines = Lines(title, total, start=start, unit=unit)
    if console is None:
        yield lines.update
        return
    with lines.written():
        yield lines.update


class Lines:
    """Progress as lines of text, written by a thread of its own so that a long stage is heard of too."""

    def __init__(self, title: str, total: float | None, *, start: float = 0, unit: str = "") -> None:
        """As `show`."""
        self._title, self._total, self._unit = title, total, unit
        self._start = self._done = start
        self._note = ""
        self._began = self._changed = time.monotonic()
        self._told_at, self._told = self._began, start
        self._end = threading.Event()
        self._file = sys.stderr  # as it is now: libraries' chatter is turned off by putting another one in its place

    def update(self, done: float, note: str = "") -> None:
        """Say how much is done; cheap, nothing is written."""
        self._done, self._note, self._changed = done, note, time.monotonic()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write lines to stderr while the work goes on."""
        thread = threading.Thread(target=self._run, name="edgeprompt-progress", daemon=True)
        with beside(thread, self._end):
            yield

    def _run(self) -> None:
        while not self._end.wait(min(1.0, FIRST_S / 4)):
            now = time.monotonic()
            if self.due(now):
                self._told_at, self._told = now, self._done
                with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
                    print(self.line(now), file=self._file, flush=True)

    def due(self, now: float) -> bool:
        """Whether it is time for a line."""
        waited = now - self._told_at
        if waited < FIRST_S:
            return False
        first = self._told_at == self._began
        share = (self._done - self._told) / self._total if self._total else 0.0
        return first or share >= SHARE or waited >= LONGEST_S

    def line(self, now: float) -> str:
        """How far the work is, how fast, and the time that is left if it goes on like this."""
        spent, made = self._changed - self._began, self._done - self._start
        parts = []
        if self._unit:
            whole = (
                f" of {self._total:g} {self._unit} ({self._done / self._total:.0%})"
                if self._total
                else f" {self._unit}"
            )
            parts.append(f"{self._done:g}{whole}")
            if made and now > self._began:
                parts.append(_rate(made / (now - self._began), self._unit))  # what comes in batches too
        else:
            parts.append(f"{self._done:.0%}")
        parts += [self._note] if self._note else []
        parts.append(f"{clock(now - self._began)} so far")
        if self._total and made:
            left = spent / made * (self._total - self._done) - (now - self._changed)
            parts += [f"about {clock(left)} left"] if left > 0 else []  # a stage that takes longer than those before
        return f"{self._title}: {', '.join(parts)}"


@contextmanager
def beside(thread: threading.Thread, end: threading.Event, timeout: float | None = None) -> Iterator[None]:
    """Run a thread until the block ends, also where a signal comes while it starts.

    Args:
        thread: not started yet.
        end: tells it to end.
        timeout: how long to wait for that; None: as long as it takes.
    """
    try:
        thread.start()
        yield
    finally:
        end.set()
        with contextlib.suppress(RuntimeError):  # it had not begun
            thread.join(timeout)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(speed: float, unit: str) -> str:
    return f"{speed:.1f} {unit}/s" if speed < 100 else f"{speed:.0f} {unit}/s"


def _bar(console: Any, unit: str) -> Progress:
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
            return Text("" if speed is None else _rate(speed, unit))

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),  # 80 columns have room for the note
        *((MofNCompleteColumn(), RateColumn()) if unit else (TaskProgressColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # else answers for a pipe would go to stderr
        transient=True,
    )
