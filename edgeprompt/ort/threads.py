"""A graph on all of its threads, or on fewer while other programs keep the cores busy.

Threads that run an operator together wait for one another. Where another program takes a core for some milliseconds,
the thread that was put off holds all others up, and fewer threads answer sooner. How long runs take decides: the
number of threads next to the present one is tried for a moment, and kept where it is quicker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Kind = tuple[str, int]

WINDOW, RUNS, RUNS_OF_A_TRY = 0.1, 4, 2
"""Seconds of runs, and runs, after which a decision is due."""
STARVED = 0.9
"""Share of the processor time that its threads could have had, below which a graph shares its cores with others."""
GAIN = 0.95
"""A number of threads is kept that takes less than this share of the time that the present one takes."""
CHANGED = 0.1
"""How far that share must fall below what it was before tries in vain for the next one to come at once."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 4.0
"""Seconds until the next try. A try that was in vain doubles them."""
MOST_LOST = 0.03
"""Share of the time that tries in vain may cost: the next one waits for as long as that takes."""


class _Window:
    """What some runs on one number of threads took."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self.runs = 0
        self._kinds: dict[Kind, tuple[int, float]] = {}
        """(units, seconds) of each kind of work."""

    def add(self, kind: Kind, units: int, seconds: float, cpu: float) -> None:
        self.seconds, self.cpu, self.runs = self.seconds + seconds, self.cpu + cpu, self.runs + 1
        count, before = self._kinds.get(kind, (0, 0.0))
        self._kinds[kind] = count + units, before + seconds

    def compared(self, other: _Window) -> float | None:
        """Time for the work that both did, as a share of the other's; None where they did nothing alike."""
        mine = theirs = 0.0
        for kind, (units, seconds) in self._kinds.items():
            if kind in other._kinds:
                count, before = other._kinds[kind]
                mine, theirs = mine + seconds, theirs + before * units / count
        return mine / theirs if theirs else None


class AdaptiveThreads:
    """Sessions of one graph that differ in their threads, and which of them runs now. For one thread at a time."""

    def __init__(self, session: Any, threads: int, open_session: Callable[[int], Any | None]) -> None:
        """Begin on all threads.

        Args:
            session: the open graph, on all threads.
            threads: how many these are.
            open_session: opens the graph on another number of threads; None where there is no memory for it. Called
                once for each number, when it is to be tried first, in a thread of its own.
        """
        self._levels = sorted({threads, max(threads - 1, 1), 1}, reverse=True)
        self._sessions: dict[int, Any] = {threads: session}
        self._open, self._opening = open_session, dict[int, Future[Any]]()
        self._level = 0
        self._window = _Window()
        self._before: tuple[int, _Window] | None = None
        """While another number is tried: the level to go back to, and what runs took there."""
        self._wait, self._next = FIRST_WAIT, 0.0
        self._share = 1.0
        """The least share of their processor time that runs had before a try in vain."""

    @property
    def threads(self) -> int:
        """On which the next run is."""
        return self._levels[self._level]

    @property
    def session(self) -> Any:
        """ONNX Runtime's session for the next run."""
        return self._sessions[self.threads]

    @property
    def sessions(self) -> list[Any]:
        """All that are open."""
        return [*self._sessions.values()]

    def ran(self, kind: Kind, units: int, began: tuple[float, float]) -> Any:
        """Take a run of `session` into account that ends now; ONNX Runtime's session for the next one.

        Args:
            kind: of work; runs of one kind take times in proportion to their units.
            units: of work.
            began: what `time.perf_counter` and `time.process_time` said before it.
        """
        now = time.perf_counter()
        self.count(kind, units, now - began[0], time.process_time() - began[1], now)
        return self.session

    def count(self, kind: Kind, units: int, seconds: float, cpu: float, now: float) -> None:
        """Take a run into account, and decide where a decision is due.

        Args:
            kind: as `ran` has it.
            units: likewise.
            seconds: that the run took.
            cpu: seconds of processor time that the process took meanwhile.
            now: a clock, in seconds.
        """
        window = self._window
        window.add(kind, units, seconds, cpu)
        if window.seconds < WINDOW or window.runs < (RUNS if self._before is None else RUNS_OF_A_TRY):
            return
        self._window = _Window()
        if self._before is not None:
            self._end_try(window, now)
        elif (target := self._to_try(window, now)) is not None and self._is_open(target):
            self._before, self._level = (self._level, window), target

    def _share_of(self, window: _Window) -> float:
        """Of the processor time that the present number of threads could have had, what runs got."""
        return window.cpu / (window.seconds * self.threads)

    def _to_try(self, window: _Window, now: float) -> int | None:
        share, due = self._share_of(window), now >= self._next
        if self._level + 1 < len(self._levels) and share < STARVED and (due or share < self._share - CHANGED):
            return self._level + 1
        return self._level - 1 if self._level and due else None

    def _end_try(self, window: _Window, now: float) -> None:
        assert self._before is not None
        (level, before), self._before = self._before, None
        ratio = window.compared(before)
        lost = 0.0
        if ratio is not None and ratio < GAIN:
            self._wait, self._share = FIRST_WAIT, 1.0
        else:
            self._level = level
            self._share = min(self._share, self._share_of(before))
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            lost = window.seconds * (1 - 1 / (ratio or 1.0))
        self._next = now + max(self._wait, lost / MOST_LOST)

    def _is_open(self, level: int) -> bool:
        """Whether a level can be tried; opens it in the background where it was not asked for yet."""
        threads = self._levels[level]
        if threads in self._sessions:
            return True
        opening = self._opening.get(threads)
        if opening is None:
            pool = ThreadPoolExecutor(1, "edgeprompt-threads")
            self._opening[threads] = pool.submit(self._open, threads)
            pool.shutdown(wait=False)
        elif opening.done():
            found = None if opening.exception() is not None else opening.result()
            if found is None:
                self._levels.remove(threads)
            else:
                self._sessions[threads] = found
        return threads in self._sessions
