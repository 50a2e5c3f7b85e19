"""Requests and streams for asyncio, with work that may block in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from edgeprompt.request import Request


async def gather(submit: Callable[[Request], Future[Any]], requests: Sequence[Request]) -> list[Any]:
    """Answers of requests, in order; cancelling the task, or the failure of a request, cancels the others.

    Args:
        submit: queues a request.
        requests: what to ask.
    """
    jobs: list[Future[Any]] = []
    stopped = threading.Event()

    def submit_all() -> None:  # in a thread: prompts may have to be read, and texts are tokenised
        for request in requests:
            jobs.append(submit(request))
            if stopped.is_set():
                break
        if stopped.is_set():
            _cancel(jobs)

    try:
        await asyncio.to_thread(submit_all)
        return list(await asyncio.gather(*(asyncio.wrap_future(job) for job in jobs)))
    finally:
        stopped.set()
        _cancel(jobs)


async def iterate(start: Callable[[], Iterator[str]]) -> AsyncIterator[str]:
    """The pieces of a stream; leaving the loop, or cancelling the task, closes it.

    Args:
        start: starts the stream, an iterator with `close`.
    """
    pieces = await asyncio.to_thread(start)
    step: asyncio.Future[str | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
            piece = await asyncio.shield(step)
            if piece is None:
                return
            yield piece
    finally:
        try:
            pieces.close()  # type: ignore[attr-defined]
        except ValueError:  # a generator that runs in the thread ends behind its next piece
            assert step is not None
            step.add_done_callback(lambda _: pieces.close())  # type: ignore[attr-defined]


def _cancel(jobs: Iterable[Future[Any]]) -> None:
    for job in jobs:
        job.cancel()
