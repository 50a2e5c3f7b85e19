"""A teacher's answers on disk: one line a batch, so that a run that was killed goes on where it was.

The first line says what was asked of whom; a file of another question is made anew. A last line that was cut is
dropped.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import TuningError
from edgeprompt.names import ANSWERS_FORMAT

VERSION = 1
_DONE = "done"


@dataclass(frozen=True)
class LabelAnswer:
    """Log-probability of every label, float32 [num_labels]."""

    logprobs: npt.NDArray[np.float32]

    def without(self, calibration: Sequence[float]) -> LabelAnswer:
        """The answer with a value subtracted from each label's score."""
        scores = self.logprobs - np.asarray(calibration, np.float32)
        return LabelAnswer(scores - np.logaddexp.reduce(scores))

    def to_json(self) -> Any:
        """As it stands in the file."""
        return _packed(self.logprobs)

    @staticmethod
    def from_json(data: Any) -> LabelAnswer:
        """Read `to_json`."""
        return LabelAnswer(_unpacked(data, np.float32))


@dataclass(frozen=True)
class TextAnswer:
    """An answer's tokens, and for each the most likely tokens with their log-probabilities.

    `ids` int32 [length], the end token included where there is one; `top` int32 [length, count], -1 where there is
    none; `logprobs` float32 [length, count].
    """

    text: str
    ids: npt.NDArray[np.int32]
    top: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    def to_json(self) -> Any:
        """As it stands in the file."""
        return [self.text, _packed(self.ids), _packed(self.top), _packed(self.logprobs)]

    @staticmethod
    def from_json(data: Any) -> TextAnswer:
        """Read `to_json`."""
        text, ids, top, logprobs = data
        found = _unpacked(ids, np.int32)
        shape = (len(found), -1)
        return TextAnswer(
            text, found, _unpacked(top, np.int32).reshape(shape), _unpacked(logprobs, np.float32).reshape(shape)
        )


Answer = LabelAnswer | TextAnswer


class AnswerFile:
    """Reads and goes on with a file of answers."""

    def __init__(self, path: Path, signature: Mapping[str, Any]) -> None:
        """`signature`: what the answers depend on; a file with another one is not used."""
        self.path = path
        self._head = json.dumps(
            {"format": ANSWERS_FORMAT, "version": VERSION, **signature}, sort_keys=True, ensure_ascii=False
        )
        self.batches = 0
        """Whole batches in the file."""
        self.rows = 0
        """Texts that they answer."""
        self.complete = False
        self.other = False
        """Whether there was a file of other answers."""
        self._end = 0
        try:
            with path.open("rb") as file:
                self._look(file)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise TuningError(f"cannot read the teacher's answers {str(path)!r}: {error.strerror or error}") from error

    def _look(self, file: IO[bytes]) -> None:
        head = file.readline()
        if head.rstrip(b"\n").decode("utf-8", "replace") != self._head or not head.endswith(b"\n"):
            self.other = True
            return
        self._end = len(head)
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            if _DONE in found:
                self.complete = True
                return
            self.batches += 1
            self.rows += len(found["rows"])
            self._end += len(line)

    def write(self, batches: Iterator[tuple[Sequence[int], Sequence[Answer]]]) -> None:
        """Append batches as they come, (rows, answers), each whole or not at all.

        Raises:
            TuningError: the file cannot be written.
        """
        try:
            # Not "r+": a file of other answers, or none, begins anew.
            with self.path.open("r+b" if self._end else "wb") as file:
                file.truncate(self._end)
                file.seek(self._end)
                if not self._end:
                    file.write(self._head.encode() + b"\n")
                for rows, answers in batches:
                    line = json.dumps({"rows": list(rows), "answers": [answer.to_json() for answer in answers]})
                    file.write(line.encode() + b"\n")
                    file.flush()
                file.write(json.dumps({_DONE: True}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TuningError(
                f"cannot write the teacher's answers {str(self.path)!r}: {error.strerror or error}"
            ) from error

    def read(self, kind: type[LabelAnswer] | type[TextAnswer], chunk: int) -> Iterator[Answer]:
        """All answers in the order of the texts; memory holds those of one `chunk` of texts, as they were made."""
        pending: dict[int, Any] = {}
        place = 0
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                found = json.loads(line)
                if _DONE in found:
                    break
                pending.update(zip(found["rows"], found["answers"], strict=True))
                while place in pending:
                    yield kind.from_json(pending.pop(place))
                    place += 1
                assert len(pending) <= chunk


def _packed(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _unpacked(text: str, dtype: Any) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
