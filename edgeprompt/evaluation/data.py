"""Records of data, streamed: .csv, .tsv, .jsonl, .parquet, a dataset id, or a list of mappings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from edgeprompt.errors import DataError
from edgeprompt.evaluation.formats import READERS, Record, read_dataset, read_file, with_names
from edgeprompt.package.files import sha256_file

DataSource: TypeAlias = str | os.PathLike[str] | Sequence[Record]
"""A file, a dataset id (`name` or `name:split`, split "train" without one), or records in memory."""


def read_records(source: DataSource, *, columns: Sequence[str] = (), keep_broken: bool = False) -> Iterator[Record]:
    """Stream the records of `source`, holding one (parquet: one batch) at a time.

    Args:
        source: what to read.
        columns: columns that every record must have.
        keep_broken: as `edgeprompt.evaluation.formats.read_file`.

    Raises:
        DataError: nothing there, unreadable, empty, or a record lacks a column; the message names what is there.
    """
    count = 0
    for count, record in enumerate(_open(source, keep_broken), 1):
        if not isinstance(record, Mapping):
            raise DataError(
                f"row {count} of {source_name(source)!r} is a {type(record).__name__}, not a mapping of columns"
            )
        for column in columns:
            if record.get(column) is None:
                raise DataError(_missing(source, count, column, record))
        yield record
    if not count:
        raise DataError(f"data {source_name(source)!r} is empty: it has no row")


def column_names(source: DataSource) -> list[str]:
    """Column names of the first record.

    Raises:
        DataError: as `read_records`.
    """
    return list(next(read_records(source)))


def source_name(source: DataSource) -> str:
    """What to call `source` in messages."""
    return str(source) if isinstance(source, (str, os.PathLike)) else str(getattr(source, "name", "rows"))


def data_hash(source: DataSource) -> str:
    """SHA-256 of a file's bytes, of a dataset's id, or of records in memory, as "sha256:..."."""
    if not isinstance(source, (str, os.PathLike)):
        digest = hashlib.sha256()
        for record in source:
            digest.update(json.dumps(dict(record), sort_keys=True, default=str).encode() + b"\n")
        return "sha256:" + digest.hexdigest()
    if Path(source).is_file():
        return "sha256:" + sha256_file(source)
    return "sha256:" + hashlib.sha256(str(source).encode()).hexdigest()


def _open(source: DataSource, keep_broken: bool) -> Iterator[Record]:
    if not isinstance(source, (str, os.PathLike)):
        return with_names(source, getattr(source, "features", None))
    path = Path(source)
    if path.is_file():
        return read_file(path, keep_broken=keep_broken)
    if path.is_dir():
        raise DataError(f"data {str(path)!r} is a folder; give one file ({', '.join(READERS)}) or a dataset id")
    if path.exists():
        raise DataError(
            f"data {str(path)!r} is a pipe or a device, and only regular files are read; write it into a file"
        )
    if path.suffix.lower() in READERS or path.is_absolute() or str(source).startswith((".", "~")):
        raise DataError(f"no data file at {str(source)!r}")
    return read_dataset(str(source))


def _missing(source: DataSource, number: int, column: str, record: Record) -> str:
    name = source_name(source)
    if column in record:
        return f"row {number} of {name!r} has nothing in column {column!r}"
    return f"{name!r} has no column {column!r} (row {number}); it has: {', '.join(map(str, record)) or 'none'}"
