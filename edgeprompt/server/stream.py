"""Generations as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import Response

from edgeprompt.decoding.detokenizer import TextPiece
from edgeprompt.engines.scheduler import Job
from edgeprompt.request import Generation
from edgeprompt.server.answers import REASONS, TokenTexts, envelope, usage_of
from edgeprompt.server.failures import failure_of
from edgeprompt.server.gate import Receive, Scope, Send
from edgeprompt.server.questions import Question

PING = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection."""
Pieces = asyncio.Queue[tuple[int, str | None]]


class EventStream(Response):
    """Sends events as they come; `ended` is called once, with whether the client went away before the end."""

    media_type = "text/event-stream"

    def __init__(self, made: AsyncIterator[bytes], ended: Callable[[bool], None], *, send_timeout: float) -> None:
        """`send_timeout`: seconds for which a client may leave an event unread."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._made, self._ended, self._timeout = made, ended, send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; leave when the client does."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not sending.done() or sending.cancelled() or sending.exception() is not None
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            self._ended(left)
        if sending.done() and not sending.cancelled():
            error = sending.exception()
            if error is not None and not isinstance(error, OSError):  # OSError, TimeoutError: the client is not there
                raise error

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._made:
            async with asyncio.timeout(self._timeout):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(
    question: Question,
    identity: str,
    kind: str,
    pieces: Pieces,
    jobs: Sequence[Job],
    decode: Callable[[Sequence[int]], str],
    choices: int,
    *,
    chat: bool,
    told: list[Any],
) -> AsyncIterator[bytes]:
    """The events of a stream: a chunk for each piece, a last one for each choice, the usage where it is asked for.

    Args:
        question: what was asked.
        identity: the answer's id.
        kind: its `object`, without "chunk".
        pieces: index of a choice and text; None when its job is done.
        jobs: one for each choice.
        decode: ids to text.
        choices: of each text.
        chat: whether it is a chat.
        told: gets the result, or the error, of every choice, in order.
    """
    kind = f"{kind}.chunk" if chat else kind
    usage: dict[str, Any] = {"usage": None} if question.include_usage else {}
    top = question.top_logprobs
    texts = [TokenTexts(decode, chat=chat, top=top or 0) for _ in jobs]
    shown = [0] * len(jobs)
    """Tokens of each choice whose log-probabilities went out."""

    def chunk(index: int, text: str | None, logprobs: Any, reason: str | None, role: bool = False) -> bytes:
        said: dict[str, Any] = {"text": text or ""}
        if chat:
            content = {} if text is None else {"content": text}
            said = {"delta": {**({"role": "assistant"} if role else {}), **content}}
        one = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return _event(envelope(kind, identity, question.model, choices=[one], **usage))

    if chat:
        for index in range(len(jobs)):
            yield chunk(index, "", None, None, role=True)
    open_jobs, failed = len(jobs), False
    while open_jobs:
        try:
            async with asyncio.timeout(PING):
                index, piece = await pieces.get()
        except TimeoutError:
            yield b": waiting\n\n"
            continue
        if piece is not None:
            logprobs = None
            if top is not None and isinstance(piece, TextPiece):
                shown[index] += len(piece.token_ids)
                logprobs = texts[index].add(piece.token_ids, piece.logprobs, piece.top_logprobs)
            yield chunk(index, str(piece), logprobs, None)
            continue
        open_jobs -= 1
        error = jobs[index].exception()
        if error is not None:
            if not failed:  # one error ends the stream for the client
                failed = True
                yield _event(failure_of(error, question.model).body())
                for job in jobs:
                    job.cancel()
            continue
        result: Generation = jobs[index].result()
        logprobs, rest = None, slice(shown[index], None)
        if top is not None and result.token_ids[rest]:  # of tokens that ended without text, as a stop text's
            logprobs = texts[index].add(result.token_ids[rest], result.logprobs[rest], result.top_logprobs[rest])
        yield chunk(index, None, logprobs, REASONS[result.finish_reason])
    told += [job.exception() or job.result() for job in jobs]
    if failed:
        return
    if question.include_usage:
        found = usage_of(told, choices).as_json()
        yield _event(envelope(kind, identity, question.model, choices=[], usage=found))
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
