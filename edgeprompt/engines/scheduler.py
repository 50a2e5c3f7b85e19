"""The life of a request, the same for every architecture: a job waits, a lane takes it, steps follow, it ends once.

Every lane has a thread of its own, which alone touches the lane's caches. It repeats: drop what was cancelled or is
late, take from the queue what there is room for, compute one step. Jobs join and leave between steps.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from edgeprompt.errors import (
    EdgePromptError,
    InferenceError,
    InputError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)

_LOG = logging.getLogger("edgeprompt")
_WAITS = (
    "a callback of a request waits for the runtime on the thread that computes, which would never end; hand the work "
    "to another thread, or use submit and its callbacks"
)
LOOK_EVERY = 0.02
"""Seconds; a long queue is not searched at every step."""


class Job(Future[Any]):
    """A request in flight: a Future that can be cancelled at any time (asyncio's `wrap_future` does so too).

    A cancelled job fails with `RequestCancelledError`, a late one with `RequestTimeoutError`.
    """

    def __init__(self, timeout: float | None, answer: Callable[[], Any]) -> None:
        """`timeout`: seconds from now, or None. `answer` makes the result, once all is computed."""
        super().__init__()
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.answer = answer
        self._cancel_asked = self._ending = False
        self.threads: Collection[threading.Thread] = ()
        """Those that compute it."""

    def result(self, timeout: float | None = None) -> Any:
        """As `Future.result`.

        Raises:
            InputError: called on the thread that computes, which would wait for itself.
        """
        self._check_thread()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `Future.exception`.

        Raises:
            InputError: as `result`.
        """
        self._check_thread()
        return super().exception(timeout)

    def _check_thread(self) -> None:
        if threading.current_thread() in self.threads and not self.done():
            raise InputError(_WAITS)

    def cancel(self) -> bool:
        """Ask for cancellation, which takes effect before the next step; False if the job is done."""
        with self._condition:
            self._cancel_asked = self._cancel_asked or not self._ending
            return self._cancel_asked and not self._ending

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """As `Future.add_done_callback`; what a callback raises on the scheduler's thread is logged, SystemExit too."""

        def called(job: Any) -> None:
            try:
                fn(job)
            except Exception:
                raise  # the standard library logs it
            except BaseException as error:
                if threading.current_thread() is threading.main_thread():
                    raise
                _LOG.exception("a callback of a request raised %r", error)

        super().add_done_callback(called)

    def why_stop(self, now: float) -> EdgePromptError | None:
        """Why the job must stop at `now` (`time.monotonic`), or None."""
        if self._cancel_asked:
            return RequestCancelledError("the request was cancelled")
        if self.deadline is not None and now > self.deadline:
            return RequestTimeoutError("the request's timeout passed before it finished")
        return None

    def finish(self) -> None:
        """Set the result, or the error if the answer failed, is late, or was cancelled."""
        try:
            found = self.answer()
        except Exception as error:
            self.fail(error)
            return
        stop = self._end()
        if stop is None:
            self.set_result(found)
        else:
            self.set_exception(stop)

    def fail(self, error: BaseException) -> None:
        """Set the error; an unexpected one becomes an `InferenceError`."""
        self._end()
        if not isinstance(error, EdgePromptError):
            wrapped = InferenceError(f"the request failed: {(str(error) or repr(error)).splitlines()[0]}")
            wrapped.__cause__ = error
            error = wrapped
        self.set_exception(error)

    def abandon(self, error: EdgePromptError) -> None:
        """`fail` in a forked child, where a thread of the parent may have held the lock."""
        self._condition = threading.Condition()
        if not self.done():
            self.fail(error)

    def _end(self) -> EdgePromptError | None:
        with self._condition:
            self._ending = True
            return self.why_stop(time.monotonic())


class Lane(Protocol):
    """Where jobs are computed. All but `running` is called by the lane's own thread."""

    @property
    def running(self) -> Sequence[Any]:
        """Jobs that were taken and have not ended."""

    def take(self, waiting: deque[Any]) -> bool:
        """Take from the queue what there is room for; whether anything was. Called with the queue locked."""

    def step(self) -> None:
        """Compute one step of what runs. A job that fails ends with its error, and only that one."""

    def drop(self, job: Any, error: BaseException) -> None:
        """End a running job with an error."""

    def idle(self) -> None:
        """Nothing runs: give back what a long request took."""


class Scheduler:
    """Jobs from any thread, on one lane or several."""

    def __init__(self, lanes: Sequence[Lane], *, max_queue: int, order: Callable[[Job], int] | None = None) -> None:
        """`order` sorts the jobs of one call; None keeps their order."""
        self._lanes, self._max_queue, self._order = lanes, max_queue, order
        self._waiting: deque[Job] = deque()
        self._submitted: weakref.WeakSet[Job] = weakref.WeakSet()
        """Every job that somebody may wait for, also one that is on its way from the queue to a lane."""
        self._next_look = 0.0
        """When to look through the waiting jobs again for those that were cancelled or are late."""
        self._changed = threading.Condition()
        self._closed = False
        self._threads: dict[threading.Thread, Lane] = {}
        self._served: list[Lane] = []
        """Lanes that a thread has taken."""

    def submit(self, jobs: Sequence[Job], *, wait: bool = False) -> None:
        """Queue jobs, all at once.

        With `wait`, a full queue makes the caller wait, and a job that cannot be queued in the end (late, cancelled,
        the runtime closed) fails by itself.

        Raises:
            QueueFullError: the queue is full.
            RequestCancelledError: the runtime is closed.
            InputError: the thread that computes would wait for itself (`wait`).
        """
        todo = sorted(jobs, key=self._order) if self._order else list(jobs)
        if wait and threading.current_thread() in self._threads:
            raise InputError(_WAITS)
        for job in todo:
            job.threads = self._threads
        self._submitted.update(todo)
        with self._changed:
            while wait and todo and not self._closed and self._waiting and not self._has_room(todo):
                now = time.monotonic()
                late = [(job, error) for job in todo if (error := job.why_stop(now)) is not None]
                for job, error in late:
                    todo.remove(job)
                    job.fail(error)
                first = min((job.deadline for job in todo if job.deadline is not None), default=None)
                if not late:
                    self._changed.wait(None if first is None else max(0.0, first - now))
            if not self._closed and (wait or self._has_room(todo)):
                self._waiting += todo
                self._start()
                self._changed.notify_all()
                return
            full, closed = len(self._waiting), self._closed
        if not closed:
            raise QueueFullError(f"{full} requests are waiting, the most that max_queue allows; try again later")
        for job in todo:
            job.fail(RequestCancelledError("the runtime is closed"))
        if not wait:
            raise RequestCancelledError("the runtime is closed")

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that a lane has taken and not ended; read without a lock, for people and monitors."""
        return sum(len(lane.running) for lane in self._lanes)

    def close(self) -> None:
        """Fail what waits or runs with RequestCancelledError, after the step that is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            # One whose start a signal broke off is not alive, or finds the scheduler closed.
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join()
        self._fail_waiting("the runtime is closed")

    def abandon(self, error: EdgePromptError) -> None:
        """In a forked child, which has none of the threads: fail all jobs, and take no more."""
        self._changed, self._closed = threading.Condition(), True
        for job in [*self._submitted]:
            job.abandon(error)

    def _has_room(self, jobs: Sequence[Job]) -> bool:
        return len(self._waiting) + len(jobs) <= self._max_queue

    def _start(self) -> None:
        """Start a thread for each lane that has none: with the first job, and where a signal broke that off."""
        begun = [lane for thread, lane in self._threads.items() if thread.ident is not None]
        for lane in self._lanes:
            if lane in begun:
                continue
            thread = threading.Thread(target=self._loop, args=(lane,), name="edgeprompt-scheduler", daemon=True)
            self._threads[thread] = lane
            thread.start()

    def _loop(self, lane: Lane) -> None:
        with self._changed:
            if lane in self._served:  # two threads were started for it, since a signal broke the first start off
                return
            self._served.append(lane)
        try:
            while self._await_work(lane):
                lane.step()
        except BaseException as error:  # of the scheduler itself: nobody may wait for ever
            self._fail_all(lane, f"the scheduler stopped on {error!r}")
            raise
        self._fail_all(lane, "the runtime was closed before the request finished")

    def _await_work(self, lane: Lane) -> bool:
        """Wait until the lane has something to do; False once the runtime is closed."""
        while True:
            dropped: list[tuple[Job, EdgePromptError]] = []
            with self._changed:
                if self._closed:
                    return False
                now = time.monotonic()
                if self._waiting:
                    if now >= self._next_look:
                        dropped = self._late(now)
                    if self._waiting and lane.take(self._waiting):
                        self._changed.notify_all()
                running = lane.running
                if not running and not dropped:
                    if not self._waiting:
                        lane.idle()
                    # What waits has no room beside what other lanes run, and may be cancelled or late meanwhile.
                    self._changed.wait(LOOK_EVERY if self._waiting else None)
                    continue
            for job, error in dropped:
                job.fail(error)
            for job in running:
                if (stop := job.why_stop(now)) is not None:
                    lane.drop(job, stop)
            if running:
                return True

    def _late(self, now: float) -> list[tuple[Job, EdgePromptError]]:
        """Take out of the queue what was cancelled or is late."""
        self._next_look = now + LOOK_EVERY
        dropped = [(job, error) for job in self._waiting if (error := job.why_stop(now)) is not None]
        if dropped:
            gone = {job for job, _ in dropped}
            left = [job for job in self._waiting if job not in gone]
            self._waiting.clear()
            self._waiting += left
            self._changed.notify_all()
        return dropped

    def _fail_waiting(self, reason: str) -> None:
        with self._changed:
            self._closed = True
            left = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            job.fail(RequestCancelledError(reason))

    def _fail_all(self, lane: Lane, reason: str) -> None:
        self._fail_waiting(reason)
        for job in lane.running:
            if not job.done():  # the lane may have stopped before it forgot one that ended
                lane.drop(job, RequestCancelledError(reason))
