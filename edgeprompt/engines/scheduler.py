"""One scheduler per session: requests from any thread, prefilled one by one, decoded together.

Its thread repeats: drop what was cancelled or is late; prefill a chunk of the next request; run one decode step for
all rows. Rows join and leave between steps. The thread alone touches the graph and its cache.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeprompt.engines.decoder.graph import DecoderGraph
from edgeprompt.errors import CapacityError, EdgePromptError, RequestCancelledError, RequestTimeoutError
from edgeprompt.ort.kv_cache import KV

Logits = npt.NDArray[np.float32]


LOOK_EVERY = 0.02
"""Seconds; a long queue is not searched at every step."""


class Work(Protocol):
    """What one request does with its logits. Called by the scheduler's thread only."""

    length: int
    """Positions of the row that count; a step may lower it to go back."""

    def advance(self, logits: Logits) -> int | None:
        """Take the logits [vocab_size] behind the last token; the next token to run, or None when done."""

    def result(self) -> Any:
        """The answer, once done."""


class Start(Protocol):
    """How a request begins."""

    ids: Sequence[int]
    """What to prefill, behind the prefix; nothing where only the prefix is to be made ready."""
    total: int
    """Most positions that the row may reach."""
    states: list[Logits] | None
    """Gets the hidden states behind every piece of `ids`; None: nobody asks for them."""

    def prefix(self, graph: DecoderGraph, slot: int, total: int) -> KV | None:
        """Keys and values to start on, or None; a prefix that is not resident is computed in the free `slot`."""

    def rows(self) -> Logits | None:
        """Prompt rows that virtual ids among `ids` index, or None."""


class Job(Future[Any]):
    """A request in flight: a Future that can be cancelled at any time (asyncio's wrap_future does so too)."""

    def __init__(self, start: Start, work: Work, timeout: float | None) -> None:
        super().__init__()
        self.start, self.work = start, work
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.cancel_asked = False
        self.token = 0
        self.filled = 0
        """How many of `start.ids` are prefilled."""

    def cancel(self) -> bool:
        """Ask for cancellation, which takes effect before the next step; False if the job is done."""
        self.cancel_asked = True
        return not self.done()

    def finish(self, error: BaseException | None = None) -> None:
        """Set the result, or the error."""
        if error is not None:
            self.set_exception(error)
            return
        try:
            self.set_result(self.work.result())
        except Exception as failure:
            self.set_exception(failure)


class Scheduler:
    """Runs jobs on one graph."""

    def __init__(self, graph: DecoderGraph, *, max_rows: int, max_queue: int) -> None:
        self.graph, self._max_rows, self._max_queue = graph, max_rows, max_queue
        self._waiting: deque[Job] = deque()
        self._rows: list[Job] = []
        """Rows of the decode step, by slot."""
        self._filling: Job | None = None
        """The job that is being prefilled, in the slot behind the rows."""
        self._next_look = 0.0
        """When to look through the waiting jobs again for those that were cancelled or are late."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="edgeprompt-scheduler", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Jobs that wait or run."""
        return len(self._waiting) + len(self._rows) + (self._filling is not None)

    def submit(self, job: Job, *, wait: bool = False) -> Job:
        """Queue a job. A full queue makes the caller wait with `wait`, and is an error without.

        Raises:
            CapacityError: the queue is full, or the job alone is larger than the cache's budget.
            RequestCancelledError: the scheduler is closed, or the job was cancelled meanwhile.
            RequestTimeoutError: the job's time passed while it waited for room.
        """
        if not self.graph.fits(1, job.start.total):
            raise CapacityError(
                f"a request of {job.start.total} positions is larger than the KV budget; "
                "raise kv_budget, or lower max_new_tokens or the text's length"
            )
        with self._changed:
            while wait and not self._closed and len(self._waiting) >= self._max_queue:
                error = _why_stop(job, time.monotonic())
                if error is not None:
                    raise error
                self._changed.wait(None if job.deadline is None else job.deadline - time.monotonic())
            if self._closed:
                raise RequestCancelledError("the runtime is closed")
            if len(self._waiting) >= self._max_queue:
                raise CapacityError(
                    f"{len(self._waiting)} requests are waiting, the most that max_queue allows; try again later"
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def close(self) -> None:
        """Fail what waits or runs with RequestCancelledError, after the step that is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        try:
            while self._await_work():
                self._reap()
                self._prefill()
                self._decode()
        except BaseException as error:  # of the scheduler itself: nobody may wait for ever
            self._fail_all(f"the scheduler stopped on {error!r}")
            raise
        self._fail_all("the runtime was closed before the request finished")

    def _await_work(self) -> bool:
        with self._changed:
            if not (self._waiting or self._rows or self._filling or self._closed):
                self.graph.idle()
            while not (self._waiting or self._rows or self._filling or self._closed):
                self._changed.wait()
            return not self._closed

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            self._closed = True
            left = [*self._waiting, *self._rows, *([self._filling] if self._filling else [])]
            self._waiting.clear()
            self._rows.clear()
            self._filling = None
            self._changed.notify_all()
        for job in left:
            job.finish(RequestCancelledError(reason))

    def _reap(self) -> None:
        """Drop jobs that were cancelled or are late."""
        now = time.monotonic()
        for slot in reversed(range(len(self._rows))):
            error = _why_stop(self._rows[slot], now)
            if error is not None:
                self._leave(slot, error)
        if self._filling is not None:
            error = _why_stop(self._filling, now)
            if error is not None:
                self._filling.finish(error)
                self._filling = None
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY
        with self._changed:
            dropped = [(job, error) for job in self._waiting if (error := _why_stop(job, now)) is not None]
            if dropped:
                gone = {job for job, _ in dropped}
                self._waiting = deque(job for job in self._waiting if job not in gone)
                self._changed.notify_all()
        for job, error in dropped:
            job.finish(error)

    def _admit(self) -> Job | None:
        """The next waiting job, once there is room for it."""
        with self._changed:
            if not self._waiting or len(self._rows) >= self._max_rows:
                return None
            job = self._waiting[0]
            if self._rows and not self.graph.fits(len(self._rows) + 1, self._longest(job)):
                return None
            self._waiting.popleft()
            self._changed.notify_all()
            return job

    def _longest(self, job: Job) -> int:
        return max(job.start.total, *(row.start.total for row in self._rows), 0)

    def _prefill(self) -> None:
        """Run one chunk of one request."""
        job, slot = self._filling, len(self._rows)
        try:
            if job is None:
                job = self._admit()
                if job is None:
                    return
                error = _why_stop(job, time.monotonic())
                if error is not None:
                    job.finish(error)
                    return
                total = self._longest(job)
                prefix = job.start.prefix(self.graph, slot, total)
                job.work.length = 0 if prefix is None else prefix.shape[2]
                if not job.start.ids:
                    job.finish()
                    return
                self.graph.place(slot, prefix, total, slot)
            piece = job.start.ids[job.filled : job.filled + self.graph.chunk]
            logits = self.graph.prefill(slot, piece, job.work.length, job.start.rows(), job.start.states)
            job.filled += len(piece)
            job.work.length += len(piece)
            if job.filled < len(job.start.ids):
                self._filling = job
                return
            self._filling = None
            token = job.work.advance(logits)
        except Exception as failure:
            self._filling = None
            if job is not None:
                job.finish(failure)
            return
        if token is None:
            job.finish()
            return
        job.token = token
        self._rows.append(job)

    def _decode(self) -> None:
        """One step for all rows. If it fails, each row is tried alone, so that only the culprit fails."""
        rows = self._rows
        if not rows:
            return
        try:
            logits = list(self.graph.decode([job.token for job in rows], [job.work.length for job in rows]))
        except Exception:
            logits = []
        for slot in reversed(range(len(rows))):
            job = rows[slot]
            try:
                row = logits[slot] if logits else self.graph.decode_one(slot, job.token, job.work.length)
                job.work.length += 1
                token = job.work.advance(row)
            except Exception as error:
                self._leave(slot, error)
                continue
            if token is None:
                self._leave(slot)
            else:
                job.token = token

    def _leave(self, slot: int, error: BaseException | None = None) -> None:
        """Take a row out; the last row takes its slot."""
        job, last = self._rows[slot], len(self._rows) - 1
        if slot != last:
            self.graph.move(last, slot, self._rows[last].work.length)
            self._rows[slot] = self._rows[last]
        if self._filling is not None:
            self.graph.move(last + 1, last, self._filling.work.length)
        self._rows.pop()
        job.finish(error)


def _why_stop(job: Job, now: float) -> EdgePromptError | None:
    if job.cancel_asked:
        return RequestCancelledError("the request was cancelled")
    if job.deadline is not None and now > job.deadline:
        return RequestTimeoutError("the request's timeout passed before it finished")
    return None
