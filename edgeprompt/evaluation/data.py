"""Rows of data, streamed: .csv, .tsv, .jsonl, .parquet, a dataset id, or a list of mappings."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from edgeprompt.errors import DataError, MissingDependencyError
from edgeprompt.package.files import sha256_file

Row: TypeAlias = Mapping[str, Any]
DataSource: TypeAlias = str | os.PathLike[str] | Sequence[Row]
"""A file, a dataset id (`name` or `name:split`, split "train" without one), or rows in memory."""

_FIELD_LIMIT = 1 << 27


def read_rows(source: DataSource, *, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Stream the rows of `source`, holding one (parquet: one batch) at a time.

    Args:
        source: what to read.
        columns: columns that every row must have.

    Raises:
        DataError: nothing there, unreadable, empty, or a row lacks a column; the message names what is there.
    """
    count = 0
    for count, row in enumerate(_open(source), 1):
        for column in columns:
            if row.get(column) is None:
                raise DataError(_missing(source, count, column, row))
        yield row
    if not count:
        raise DataError(f"data {source_name(source)!r} is empty: it has no row")


def column_names(source: DataSource) -> list[str]:
    """Column names of the first row.

    Raises:
        DataError: as `read_rows`.
    """
    return list(next(read_rows(source)))


def text_of(row: Row, column: str, where: str) -> str:
    """A row's cell as text: numbers and booleans are written out, anything else is refused.

    Raises:
        DataError: the cell is missing, empty (null), a list or an object.
    """
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    if value is None:
        raise DataError(f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}, text is needed")


def labels_of(row: Row, column: str, where: str) -> list[str]:
    """Several labels of one row: a list, or a text with commas."""
    value = row.get(column)
    if isinstance(value, (list, tuple)):
        return [str(label) for label in value]
    return [label.strip() for label in text_of(row, column, where).split(",") if label.strip()]


def tagged_words(row: Row, where: str) -> tuple[list[str], list[str]]:
    """Words and their tags from the columns `tokens` and `tags`: lists, or texts split at white space."""
    found = []
    for column in ("tokens", "tags"):
        value = row.get(column)
        found.append(
            [str(x) for x in value] if isinstance(value, (list, tuple)) else text_of(row, column, where).split()
        )
    words, tags = found
    if len(words) != len(tags) or not words:
        raise DataError(f"{where} has {len(words)} tokens and {len(tags)} tags; each token needs one tag")
    broken = next((word for word in words if len(word.split()) != 1), None)
    if broken is not None:
        raise DataError(f"{where}: token {broken!r} is empty or holds white space; words are what stands between it")
    return words, tags


def given_answer(row: Row, context: str, where: str) -> tuple[str, int]:
    """The answer and where it starts: SQuAD's `answers` (texts and starts), or a column `answer`; "" for none."""
    answers: Any = row.get("answers")
    if isinstance(answers, Mapping):
        texts, starts = list(answers.get("text") or ()), list(answers.get("answer_start") or ())
        answer, start = (str(texts[0]), int(starts[0]) if starts else -1) if texts else ("", -1)
    else:
        answer, start = text_of(row, "answer", where), -1
    if not answer:
        return "", 0
    start = context.find(answer) if start < 0 else start
    if start < 0 or context[start : start + len(answer)] != answer:
        raise DataError(f"{where}: the answer {answer[:60]!r} does not stand in the context")
    return answer, start


def source_name(source: DataSource) -> str:
    """What to call `source` in messages."""
    return str(source) if isinstance(source, (str, os.PathLike)) else "rows"


def data_hash(source: DataSource) -> str:
    """SHA-256 of a file's bytes, of a dataset's id, or of rows in memory, as "sha256:..."."""
    if not isinstance(source, (str, os.PathLike)):
        digest = hashlib.sha256()
        for row in source:
            digest.update(json.dumps(dict(row), sort_keys=True, default=str).encode() + b"\n")
        return "sha256:" + digest.hexdigest()
    if Path(source).is_file():
        return "sha256:" + sha256_file(source)
    return "sha256:" + hashlib.sha256(str(source).encode()).hexdigest()


def _open(source: DataSource) -> Iterable[Row]:
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise DataError(f"data file {str(path)!r} ends in {path.suffix!r}; known: {', '.join(_READERS)}")
        return _reading(path, reader)
    if path.is_dir():
        raise DataError(f"data {str(path)!r} is a folder; give one file ({', '.join(_READERS)}) or a dataset id")
    if reader is not None or path.is_absolute() or str(source).startswith((".", "~")):
        raise DataError(f"no data file at {str(source)!r}")
    return _dataset(str(source))


def _missing(source: DataSource, number: int, column: str, row: Row) -> str:
    name = source_name(source)
    if column in row:
        return f"row {number} of {name!r} has nothing in column {column!r}"
    return f"{name!r} has no column {column!r} (row {number}); it has: {', '.join(map(str, row)) or 'none'}"


def _reading(path: Path, reader: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read data file {str(path)!r}: {error.strerror or error}") from error


def _delimited(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                header = next(reader, None)
                if header is None:
                    return
                if len(set(header)) != len(header):
                    raise DataError(f"data file {str(path)!r} names a column twice: {', '.join(header)}")
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        raise DataError(
                            f"line {reader.line_num} of {str(path)!r} has {len(cells)} columns, "
                            f"the first line names {len(header)} ({', '.join(header)})"
                        )
                    yield dict(zip(header, cells, strict=True))
            except csv.Error as error:
                raise DataError(f"line {reader.line_num} of {str(path)!r}: {error}") from error

    return read


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {str(path)!r} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {str(path)!r} is no JSON object but {type(row).__name__}")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError("parquet files need pyarrow: pip install 'edgeprompt[tune]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read parquet file {str(path)!r}: {' '.join(str(error).split())}") from error


def _dataset(identifier: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("dataset ids need datasets: pip install 'edgeprompt[tune]'") from error
    name, _, split = identifier.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the hub client raises kinds of several libraries
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"no data file at {identifier!r}, and no dataset of that id could be read: {reason}") from error
    yield from rows


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
