"""Text from tokens, piece by piece: characters that end in a later token, stop strings across token borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
