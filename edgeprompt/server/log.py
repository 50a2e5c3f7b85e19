"""The log: one JSON object a line on stderr, without texts unless the operator asks for them."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from edgeprompt.errors import BaseMismatchError, MissingDependencyError, PromptFileError

WAITING = 10_000
"""Most events that wait for whoever reads the log."""
LAST = 1.0
"""Seconds that they get at the end."""
_WITHOUT_TEXTS = (PromptFileError, BaseMismatchError, MissingDependencyError)
"""Errors that speak of the server's own files and packages alone."""


class Log:
    """Writes events, from any thread, by a thread of its own.

    Whoever reads the log may stop reading it: then the newest events are left out and counted, and no request waits.
    """

    def __init__(self, *, texts: bool = False, file: TextIO | None = None) -> None:
        """`texts`: whether `text` fields and the words of unforeseen errors are written."""
        self.texts = texts
        self._file = file
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._writing = self._closed = False
        self._thread: threading.Thread | None = None

    def write(self, event: str, **fields: Any) -> None:
        """One event; fields that are None are left out."""
        line = _line(event, fields)
        with self._changed:
            if self._closed or len(self._lines) >= WAITING:
                self._dropped += 1
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="edgeprompt-log", daemon=True)
                self._thread.start()
            self._lines.append(line)
            self._changed.notify_all()

    def flush(self, timeout: float = LAST) -> bool:
        """Wait until all events are written; False where the reader does not take them."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, timeout)

    def close(self) -> None:
        """Write what waits, if somebody reads it; events that come later are left out."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._closed)
                if self._closed:
                    return
                self._writing = True
                lines, dropped = [*self._lines], self._dropped
                self._lines.clear()
                self._dropped = 0
            if dropped:
                lines.append(_line("left_out", {"events": dropped}))
            try:
                self._put("".join(lines))
            except (OSError, ValueError):  # nobody reads it any more
                with self._changed:
                    self._lines.clear()
                    self._closed, self._writing = True, False
                    self._changed.notify_all()

    def _put(self, text: str) -> None:
        file = self._file or sys.stderr
        try:
            number = file.fileno()
        except (OSError, ValueError, AttributeError):  # no file of the system, as in tests
            file.write(text)
            file.flush()
            return
        # Not through Python's buffer: its lock would be held while the reader does not read, and the process could not
        # end.
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(number, data) :]

    def failed(self, identity: str, error: BaseException) -> None:
        """An error and where it happened. Its words may quote a text, so only `texts` has them."""
        causes: list[dict[str, Any]] = []
        cause: BaseException | None = error
        while cause is not None and len(causes) < 5:
            frames = traceback.extract_tb(cause.__traceback__)[-8:]
            places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
            said = {"said": str(cause)} if self.texts or isinstance(cause, _WITHOUT_TEXTS) else {}
            causes.append({"kind": type(cause).__name__, "at": places, **said})
            cause = cause.__cause__ or cause.__context__
        self.write("failed", id=identity, causes=causes)


def _line(event: str, fields: Mapping[str, Any]) -> str:
    found = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
    found |= {name: value for name, value in fields.items() if value is not None}
    return json.dumps(found, default=str) + "\n"


class Forward(logging.Handler):
    """Passes what uvicorn and edgeprompt log on as events, without tracebacks: these may quote a text."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._log.write("note", level=record.levelname.lower(), source=record.name, message=record.getMessage())


def forward(log: Log) -> None:
    """Pass on what uvicorn and edgeprompt log in this process."""
    for name in ("uvicorn.error", "asyncio", "edgeprompt"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Forward(log)], False
        logger.setLevel(logging.WARNING)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._start
