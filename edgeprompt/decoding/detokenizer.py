"""Text from tokens, piece by piece: characters that end in a later token, stop strings across token borders."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

REPLACEMENT = "�"


class Detokenizer:
    """Turns ids into text as they come.

    A piece is given out only when no later token can change it: bytes of an unfinished character are held back, and so
    is the longest end of the text that could begin a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._from, self._done = 0, 0
        self._held = ""
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """Whether a stop string was met; `text` ends before it."""

    def add(self, token: int) -> str:
        """Take one more id; the text that is now certain (often one word, sometimes nothing)."""
        self._ids.append(token)
        return self._emit(self._new_text())

    def would_add(self, token: int) -> str:
        """The text that one more id would add, which is not taken; the replacement character for a part of one."""
        before = self._decode(self._ids[self._from : self._done])
        return self._decode([*self._ids[self._from :], token])[len(before) :]

    def finish(self) -> str:
        """The rest, when generation ends."""
        if self.stopped:
            return ""
        self._held += self._new_text(last=True)
        rest, self._held = self._held, ""
        self.text += rest
        return rest

    def _new_text(self, *, last: bool = False) -> str:
        """What the ids behind the last border add, decoded beside their predecessors (spaces depend on them)."""
        before = self._decode(self._ids[self._from : self._done])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not last):
            return ""
        self._from, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def _emit(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
        else:
            keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            ready = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        self.text += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextPiece(str):
    """A piece of text with the tokens that came with it, where a stream was asked for log-probabilities.

    Tokens that ended without text of their own (those of a stop text) come with no piece.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]

    def __new__(
        cls,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        top_logprobs: Sequence[tuple[tuple[int, float], ...]],
    ) -> TextPiece:
        """`text`, and of each token what `Generation` says of it."""
        piece = super().__new__(cls, text)
        piece.token_ids, piece.logprobs, piece.top_logprobs = tuple(token_ids), tuple(logprobs), tuple(top_logprobs)
        return piece


class TextStream(Iterator[str]):
    """Pieces of text of a running request. Closing or dropping it cancels the request.

    `close` may be called from any thread, also while others wait for the next piece.
    """

    def __init__(self, pieces: queue.SimpleQueue[str | None], job: Future[Any]) -> None:
        """`pieces` gets the text; None, which ends the stream, is put into it when `job` is done."""
        self._pieces, self._job, self._closed = pieces, job, False
        job.add_done_callback(lambda _: pieces.put(None))

    def __next__(self) -> str:
        piece = None if self._closed else self._pieces.get()
        if piece is not None:
            return piece
        self._pieces.put(None)  # for others that wait
        if not self._closed:
            self._closed = True
            self._job.result()
        raise StopIteration

    def close(self) -> None:
        """Cancel the request if it still runs. No piece follows."""
        self._closed = True
        self._job.cancel()

    def __del__(self) -> None:
        self.close()
