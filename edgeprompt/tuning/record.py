"""Where a run's figures go: progress on stderr, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from edgeprompt.errors import MissingDependencyError
from edgeprompt.package.outputs import writing
from edgeprompt.progress import Update, clock, show
from edgeprompt.tuning.files import METRICS_FILE


class Recorder:
    """Writes figures as they come; a context manager."""

    def __init__(self, log: Path | None, *, total: int, start: int, progress: bool) -> None:
        """`log`: folder for metrics; `total`, `start`: steps of the run and those already done."""
        self._file: IO[str] | None = None
        self._board: _EventFile | None = None
        if log is not None:
            with writing(log):
                log.mkdir(parents=True, exist_ok=True)
                self._file = (log / METRICS_FILE).open("a" if start else "w", encoding="utf-8")
                self._board = _EventFile(log)
        self._shown = show("tuning", total, start=start, unit="steps", wanted=progress)
        self._update: Update
        self._best = ""
        self._step, self._note = start, ""
        self._evaluation = 0.0
        """When the evaluation that is under way began."""

    def __enter__(self) -> Recorder:
        self._update = self._shown.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.__exit__(None, None, None)
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Record one training step (counted from 1)."""
        self._write(step, figures)
        self._step, self._note = step, f"loss {figures['loss']:.3f}{self._best}"
        self._update(step, self._note)

    def evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is: `done` of `total` batches, 0 where it begins."""
        now = time.monotonic()
        if not done:
            self._evaluation = now
            return
        left = clock((now - self._evaluation) / done * (total - done))
        told = [f"evaluation {done / total:.0%}, {left} left"] if done < total else []
        self._update(self._step, ", ".join([*told, *filter(None, [self._note])]))

    def evaluation(self, step: int, figures: Mapping[str, float], note: str) -> None:
        """Record an evaluation; `note` is what the progress shows of it."""
        self._write(step, {f"eval_{name}": value for name, value in figures.items()})
        self._best = f", {note}"

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add(name, value, step)


class _EventFile:
    """TensorBoard's events, written on the caller's thread.

    `SummaryWriter` has a thread and a queue. A signal that stops the run while the queue is locked would make its
    `close` wait for ever.
    """

    def __init__(self, log: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise MissingDependencyError("--log needs tensorboard: pip install 'edgeprompt[tune]'") from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((log / name).open("wb"))
        self._write(file_version="brain.Event:2")

    def add(self, name: str, value: float, step: int) -> None:
        """Write one figure."""
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
