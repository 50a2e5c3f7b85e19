"""Answers as rows of a table: the input's columns, and what was answered."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprompt.errors import InputError

if TYPE_CHECKING:
    from edgeprompt.request import Result

_TABLE = ("prompt", "answer", "score")


@dataclass(frozen=True)
class Answered:
    """One answer, or why there is none."""

    record: Mapping[str, Any]
    """The input's columns."""
    text: str
    prompt: str | None
    result: Result | None
    error: str | None = None


@dataclass(frozen=True)
class Form:
    """How answers are written."""

    as_json: bool = False
    named: bool = False
    """Whether a line says which prompt answered."""
    single: bool = False
    """One answer, printed as it is."""
    with_errors: bool = False
    """Whether there is a column for what went wrong."""
    escaped: bool = False
    """Whether JSON is written in ASCII, for a stdout that cannot write every character."""

    def line(self, answered: Answered) -> str:
        """A line of text, or of JSON."""
        if self.as_json:
            return self.json(answered)
        answer, score = shown(answered)
        if answered.error is not None:
            answer = f"error: {answered.error}"
        if not self.single:  # one line an answer
            answer = answer.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
        cells = [*([answered.prompt or ""] if self.named else []), answer, *([score] if score else [])]
        return "\t".join(cells)

    def json(self, answered: Answered) -> str:
        """An object with the input's columns, the text, the prompt and the whole result."""
        from edgeprompt.request import as_json as plain

        found = {} if answered.result is None else plain(answered.result)
        facts = {
            "input": answered.text,
            "prompt": answered.prompt,
            **(found if isinstance(found, dict) else {"embedding": found}),
            **({"error": answered.error} if self.with_errors else {}),
        }
        whole = {**columns_of(answered.record, facts), **facts}
        return json_text(whole, escaped=self.escaped)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of `facts`."""
        return (*_TABLE, "error") if self.with_errors else _TABLE

    def facts(self, answered: Answered) -> dict[str, str]:
        """Prompt, answer, score (and error) as text."""
        answer, score = shown(answered)
        facts = dict(zip(_TABLE, (answered.prompt or "", answer, score), strict=True))
        return {**facts, "error": answered.error or ""} if self.with_errors else facts

    def cells(self, answered: Answered) -> dict[str, Any]:
        """The input's columns, and `facts`."""
        facts = self.facts(answered)
        return {**columns_of(answered.record, facts), **facts}


def columns_of(record: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The input's columns beside a result: one that is called as a part of the result becomes `input_NAME`."""
    columns = {f"input_{name}" if name in facts else str(name): value for name, value in record.items()}
    if len(columns) < len(record):
        raise InputError(f"the columns {', '.join(map(str, record))} clash with those of the result; rename one")
    return columns


def shown(answered: Answered) -> tuple[str, str]:
    """(answer, score) as text; the score is empty where there is none."""
    from edgeprompt.request import Answer, Classification, Generation, Tagging, as_json

    match answered.result:
        case None:
            return "", ""
        case Classification() as found:
            return found.label, f"{found.scores[found.label]:.4f}" if found.label in found.scores else ""
        case Generation() as found:
            return found.text, ""
        case Answer() as found:
            return found.text, f"{found.score:.4f}"
        case Tagging() as found:
            return ", ".join(f"{span.label}:{span.text}" for span in found.spans), ""
        case _ as vector:
            return json.dumps(as_json(vector)), ""


def csv_line(cells: Iterable[Any], suffix: str) -> str:
    """A line of a .csv or .tsv file, with its end; lists and objects are written as JSON."""
    text = io.StringIO(newline="")
    # Python before 3.13 quotes only the line end's own characters, and a cell may hold a lone "\r".
    csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator="\r\n").writerow(map(_flat, cells))
    return text.getvalue().removesuffix("\r\n") + "\n"


def _flat(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json_text(value)
    return value if value is None or isinstance(value, (str, bool, int, float)) else as_text(value)


def json_text(value: Any, *, escaped: bool = False) -> str:
    """JSON, which has no NaN and no infinity: null stands for them. With `escaped` in ASCII."""
    try:
        return json.dumps(value, ensure_ascii=escaped, default=as_text, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=escaped, default=as_text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def as_text(value: object) -> str:
    """A cell that JSON has no form for: bytes (of a parquet file) in base64, dates and times in ISO 8601, anything else
    as Python writes it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)
