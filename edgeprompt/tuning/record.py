"""Where a run's figures go: progress on stderr, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from edgeprompt.errors import MissingDependencyError
from edgeprompt.progress import Update, show
from edgeprompt.tuning.files import METRICS_FILE


class Recorder:
    """Writes figures as they come; a context manager."""

    def __init__(self, log: Path | None, *, total: int, start: int, progress: bool) -> None:
        """`log`: folder for metrics; `total`, `start`: steps of the run and those already done."""
        self._file: IO[str] | None = None
        self._board: Any = None
        if log is not None:
            log.mkdir(parents=True, exist_ok=True)
            self._file = (log / METRICS_FILE).open("a" if start else "w", encoding="utf-8")
            self._board = _summary_writer(log)
        self._shown = show("tuning", total, start=start, unit="steps", wanted=progress)
        self._update: Update
        self._best = ""

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
        self._update(step, f"loss {figures['loss']:.3f}{self._best}")

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
                self._board.add_scalar(name, value, step)


def _summary_writer(log: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("--log needs tensorboard: pip install 'edgeprompt[tune]'") from error
    return SummaryWriter(str(log))
