"""The log: one JSON object a line on stderr, without texts unless the operator asks for them."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from edgeprompt.errors import BaseMismatchError, MissingDependencyError, PromptFileError

_WITHOUT_TEXTS = (PromptFileError, BaseMismatchError, MissingDependencyError)
"""Errors that speak of the server's own files and packages alone."""


class Log:
    """Writes events. Safe from any thread."""

    def __init__(self, *, texts: bool = False, file: TextIO | None = None) -> None:
        """`texts`: whether `text` fields and the words of unforeseen errors are written."""
        self.texts = texts
        self._file, self._lock = file, threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """One event; fields that are None are left out."""
        found = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        found |= {name: value for name, value in fields.items() if value is not None}
        line = json.dumps(found, default=str)
        with self._lock:
            print(line, file=self._file or sys.stderr, flush=True)

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
