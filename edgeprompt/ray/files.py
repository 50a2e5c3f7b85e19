"""Files of records for Ray Data: read line by line as every command reads them, and written in parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource

from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import value_of
from edgeprompt.evaluation.formats import read_file
from edgeprompt.evaluation.requests import batches
from edgeprompt.evaluation.rows import as_text, csv_line
from edgeprompt.ray.answers import Answers

ROW = "row_hash"
"""The column that tells rows apart where the data has none for it; Ray's own name for it in parquet files."""
RECORD, LINE = "edgeprompt:record", "edgeprompt:line"
"""Columns of what is on its way: a record, and a line of the output, both as JSON."""
_AT_ONCE = 1024


class RecordFiles(FileBasedDatasource):  # type: ignore[misc]
    """Files of .csv, .tsv or .jsonl: the records as JSON, each with what tells it apart."""

    def __init__(self, paths: Sequence[str], *, id_column: str | None) -> None:
        """`id_column`: whose values tell records apart; None: the file and the place in it."""
        super().__init__([*paths])
        self._id_column = id_column

    def _read_stream(self, file: Any, path: str) -> Iterator[Any]:
        return read_blocks(path, self._id_column)


def read_blocks(path: str, id_column: str | None) -> Iterator[Any]:
    """The records of a file as tables: each record as JSON, and what tells it apart.

    Raises:
        DataError: the file is broken, or a record has nothing in `id_column`.
    """
    place = 0
    for records in batches(read_file(Path(path)), _AT_ONCE):
        if id_column is None:
            ids = pyarrow.array(row_ids(path, place, len(records)), pyarrow.uint64())
        else:
            places = enumerate(records, place + 1)
            found = [str(value_of(record, id_column, f"row {number} of {path!r}")) for number, record in places]
            ids = pyarrow.array(found, pyarrow.string())
        lines = [
            json.dumps(record, default=as_text) for record in records
        ]  # ASCII: Arrow takes no half surrogate pairs
        yield pyarrow.table({id_column or ROW: ids, RECORD: pyarrow.array(lines, pyarrow.string())})
        place += len(records)


def row_ids(path: str, start: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Numbers for rows of a file: all different in one file, and in others but for a chance of the rows in 2**64."""
    first = int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "little")
    return np.uint64(first) + np.arange(start, start + count, dtype=np.uint64)


class FileAnswers(Answers):
    """`Answers` for files: from records as JSON or columns, to lines or columns."""

    def __init__(
        self, package: str, *, id_column: str, added: bool, packed: bool, as_lines: str | None, schema: Any, **more: Any
    ) -> None:
        """Open the package.

        Args:
            package: as `Answers`.
            id_column: what tells rows apart.
            added: whether that column is none of the data's.
            packed: whether records come as JSON.
            as_lines: "jsonl" or "csv"; None makes columns.
            schema: of the columns; None: the batch's own.
            more: of `Answers`.
        """
        super().__init__(package, **more)
        self._id, self._added, self._packed, self._as_lines, self._schema = id_column, added, packed, as_lines, schema

    def __call__(self, batch: Any) -> Any:
        """A batch of answers, with what tells its rows apart."""
        ids = batch.column(self._id)
        if not self._packed and self._as_lines is None:
            return super().__call__(batch)
        records: list[Mapping[str, Any]]
        if self._packed:
            records = [json.loads(record) for record in batch.column(RECORD).to_pylist()]
        else:
            records = (batch.drop_columns([self._id]) if self._added else batch).to_pylist()
        answers = [*self.answers(records, repr(ids[0].as_py()) if len(ids) else None)]
        kept = ids.take(pyarrow.array([index for index, _ in answers], pyarrow.int64()))
        if self._as_lines is not None:
            form = replace(self._form, escaped=True)
            lines = [
                form.json(one) if self._as_lines == "jsonl" else json.dumps(form.cells(one), default=as_text)
                for _, one in answers
            ]
            return pyarrow.table({self._id: kept, LINE: pyarrow.array(lines, pyarrow.string())})
        rows = [self._form.cells(answered) for _, answered in answers]
        made = _table(rows, self._schema)
        return made.append_column(self._id, kept) if self._added else made


def _table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    """Rows as a table of the columns that the first records have.

    Raises:
        DataError: a row has another column, or another kind of value.
    """
    other = next((name for row in rows for name in row if name not in schema.names), None)
    if other is not None:
        raise DataError(f"a row has a column {other!r} that the first rows have not; write .jsonl")
    try:
        return pyarrow.Table.from_pylist([*rows], schema=schema)
    except (pyarrow.ArrowException, UnicodeEncodeError) as error:
        raise DataError(f"the columns are no table ({' '.join(str(error).split())}); write .jsonl") from error


class AnswerFiles(BlockBasedFileDatasink):  # type: ignore[misc]
    """A folder of files; a block is a file."""

    def __init__(self, path: str, suffix: str, *, without: str | None) -> None:
        """`suffix`: ".jsonl", ".csv", ".tsv" or ".parquet"; `without`: a column that is not written."""
        super().__init__(path, file_format=suffix[1:])
        self._suffix, self._without = suffix, without

    def write_block_to_file(self, block: Any, file: Any) -> None:
        """Write one part."""
        if self._suffix == ".parquet":
            table = block.to_arrow()
            pyarrow.parquet.write_table(table.drop_columns([self._without]) if self._without else table, file)
            return
        lines = block.to_arrow().column(LINE).to_pylist()
        if self._suffix == ".jsonl":
            for line in lines:
                text = json.dumps(json.loads(line), ensure_ascii=False)
                file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # an escape of JSON, read as the same
            return
        header: list[str] | None = None
        for line in lines:
            cells = json.loads(line)
            if header is None:
                header = [*cells]
                file.write(self._row(header))
            if set(cells) != set(header):
                raise DataError(f"a row has other columns than the first ({', '.join(header)}); write .jsonl")
            file.write(self._row([cells[name] for name in header]))

    def _row(self, cells: Sequence[Any]) -> bytes:
        try:
            return csv_line(cells, self._suffix).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a record holds half of a surrogate pair (U+{ord(error.object[error.start]):04X}), which no file but "
                ".jsonl can hold; write .jsonl, or repair the record"
            ) from error
