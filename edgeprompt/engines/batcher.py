"""Requests one by one, answered in batches: for engines that take a whole batch at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from edgeprompt.errors import CapacityError, RequestCancelledError, RequestTimeoutError
from edgeprompt.request import Request

WORKERS = 2
"""Batches that run at once, so that a long one does not hold up everything."""

Run = Callable[[Sequence[Request]], list[Any]]
"""Answers a batch; a row that fails is its exception."""


class Batcher:
    """Queues requests; its threads, which start with the first one, answer what has gathered as one batch."""

    def __init__(self, run: Run, *, max_batch: int, max_queue: int) -> None:
        self._run, self._max_batch, self._max_queue = run, max_batch, max_queue
        self._waiting: deque[tuple[Request, Future[Any], float]] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, request: Request) -> Future[Any]:
        """Queue a request; its future can be cancelled until its batch begins.

        Raises:
            CapacityError: the queue is full.
            RequestCancelledError: the batcher is closed.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RequestCancelledError("the runtime is closed")
            if len(self._waiting) >= self._max_queue:
                raise CapacityError(
                    f"{len(self._waiting)} requests are waiting, the most that max_queue allows; try again later"
                )
            self._waiting.append((request, future, time.monotonic()))
            if len(self._threads) < WORKERS:
                name = f"edgeprompt-batch-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._loop, name=name, daemon=True))
                self._threads[-1].start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Fail what waits; a batch that runs is the engine's to stop, and `join` waits for it."""
        with self._changed:
            self._closed = True
            left = [future for _, future, _ in self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(RequestCancelledError("the runtime was closed before the request ran"))

    def join(self) -> None:
        """Wait for the batches that run; the interpreter must not end under a thread that is inside ONNX Runtime."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _loop(self) -> None:
        while batch := self._take():
            requests, futures = [], []
            for request, future, since in batch:
                if not future.set_running_or_notify_cancel():
                    continue
                left = None if request.timeout is None else request.timeout - (time.monotonic() - since)
                if left is not None and left <= 0:
                    future.set_exception(RequestTimeoutError("the request's timeout passed before it ran"))
                    continue
                requests.append(replace(request, timeout=left))
                futures.append(future)
            try:
                results = self._run(requests)
            except BaseException as error:
                results = [error] * len(requests)
            for future, result in zip(futures, results, strict=True):
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _take(self) -> list[tuple[Request, Future[Any], float]]:
        """The next batch; empty once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
