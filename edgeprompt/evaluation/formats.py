"""Data files to records: one reader for each format, streamed, and strict about what is not certain.

A record is a mapping of column names to values. Class ids whose names the data carries (`ClassLabel` of the datasets
library, also in its parquet files) become the names here.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from edgeprompt.errors import DataError, MissingDependencyError
from edgeprompt.package import strict_json

Record: TypeAlias = Mapping[str, Any]


class BrokenRecord(dict[str, Any]):
    """A line of a `.jsonl` file that is no record; it may have the columns of the others, without values."""

    def __init__(self, error: str) -> None:
        """`error`: why, with the line's number."""
        super().__init__()
        self.error = error


_FIELD_LIMIT = 1 << 27
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SPACED = re.compile(r'\s+".*"\s*', re.DOTALL)
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_GZIP = b"\x1f\x8b"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SHORT: Mapping[str, type[np.floating[Any]]] = {
    "float": np.float32, "float32": np.float32, "halffloat": np.float16, "float16": np.float16,
}  # fmt: skip
"""Floats of fewer bits than Python's, as Arrow and the datasets library call them."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def read_lines(file: IO[bytes], name: str) -> Iterator[Record]:
    """Each line of a text as a record with the column `text`; `name` is what to call the file.

    Raises:
        DataError: no line, or no text in UTF-8 or UTF-16.
    """
    peekable: Any = file if hasattr(file, "peek") else io.BufferedReader(file)
    text = io.TextIOWrapper(peekable, encoding=_encoding(peekable.peek(4)))
    count = 0
    try:
        for line in text:
            count += 1
            yield {"text": line.rstrip("\n")}
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason} behind line {count}); save it as UTF-8") from error
    finally:
        text.detach()  # whoever opened the bytes closes them
    if not count:
        raise DataError(f"{name} is empty: it has no line")


def _encoding(start: bytes) -> str:
    """UTF-8, or what the byte order mark at the start of a file says."""
    return next((name for mark, name in _BOMS if start.startswith(mark)), "utf-8")


def _open(path: Path, newline: str | None = None, *, escape: bool = False) -> IO[str]:
    """Open a text file; `newline` None reads "\\r\\n" and "\\r" as "\\n" too; with `escape`, bytes that are no UTF-8
    become halves of surrogate pairs."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_GZIP):
        raise DataError(f"data file {str(path)!r} is compressed with gzip; decompress it first")
    encoding = _encoding(start)
    escaped = escape and encoding.startswith("utf-8")
    return path.open(encoding=encoding, newline=newline, errors="surrogateescape" if escaped else None)


def read_file(path: Path, *, keep_broken: bool = False) -> Iterator[Record]:
    """The records of a file, by its suffix.

    Args:
        path: the file.
        keep_broken: a line of a `.jsonl` file that is no record becomes a `BrokenRecord`, not an error.

    Raises:
        DataError: unknown suffix, unreadable, or broken; the message names the line.
    """
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        more = "; decompress it first" if suffix in _COMPRESSED else ""
        raise DataError(f"data file {str(path)!r} ends in {path.suffix!r}{more}; known: {', '.join(READERS)}")
    try:
        yield from _json_lines(path, keep_broken=True) if keep_broken and reader is _json_lines else reader(path)
    except UnicodeError as error:
        reason = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
        raise DataError(f"data file {str(path)!r} is not UTF-8 text ({reason}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read data file {str(path)!r}: {error.strerror or error}") from error


def read_dataset(identifier: str) -> Iterator[Record]:
    """The records of a dataset id, `name` or `name:split`, streamed.

    Raises:
        DataError: no such dataset, or no network.
        MissingDependencyError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("dataset ids need datasets: pip install 'edgeprompt[tune]'") from error
    name, _, split = identifier.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train", streaming=True)
        yield from with_names(records, records.features)
    except DataError:
        raise
    except Exception as error:  # the hub client raises kinds of several libraries
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"no data file at {identifier!r}, and no dataset of that id could be read: {reason}") from error


def with_names(records: Iterable[Record], features: Any) -> Iterator[Record]:
    """Records whose class ids are replaced by their names, and whose small floats have the digits that were meant.

    Args:
        records: what to read.
        features: column -> feature, of the datasets library or as its parquet files describe them; None: unknown.

    Raises:
        DataError: an id that has no name; the message names the row.
    """
    features = features or {}
    named = {column: names for column, feature in features.items() if (names := _class_names(feature))}
    short = {column: size for column, feature in features.items() if (size := _SHORT.get(str(_get(feature, "dtype"))))}
    for number, record in enumerate(records, 1):
        if not named and not short:
            yield record
            continue
        made = dict(record)
        for column, size in short.items():
            if isinstance(made.get(column), float):
                made[column] = float(str(size(made[column])))  # 0.1, where float32's own value is 0.10000000149
        for column, names in named.items():
            if column in made:
                made[column] = _name(made[column], names, f"row {number}: column {column!r}")
        yield made


def _class_names(feature: Any) -> Sequence[str] | None:
    """Names of a `ClassLabel`, or of a list of them; None for any other feature."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])

    if (_get(feature, "_type") or type(feature).__name__) == "ClassLabel":
        names = _get(feature, "names")
        known = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        return names if known else None
    inner = _get(feature, "feature")
    return None if inner is None else _class_names(inner)


def _get(feature: Any, key: str) -> Any:
    return feature.get(key) if isinstance(feature, Mapping) else getattr(feature, key, None)


def _name(value: Any, names: Sequence[str], where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_name(one, names, where) for one in value]
    if not isinstance(value, int) or value == -1:  # -1 is how the datasets library writes "no label"
        return None if value == -1 else value
    if not 0 <= value < len(names):
        raise DataError(f"{where} holds class {value}, and the data names {len(names)}: {', '.join(names)}")
    return names[value]


def _rows(path: Path, cells: Iterator[Sequence[str]], line: Callable[[], int]) -> Iterator[Record]:
    """Records from the cells of a table whose first row names the columns; `line` says where it stands."""
    header = next(cells, None)
    if header is None:
        return
    header = [name.strip() for name in header]
    _check_header(path, header)
    for row in cells:
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(
                f"line {line()} of {str(path)!r} has {len(row)} columns, "
                f"the first line names {len(header)} ({', '.join(header)})"
            )
        yield dict(zip(header, row, strict=True))


def _check_header(path: Path, header: Sequence[str]) -> None:
    if len(set(header)) != len(header):
        raise DataError(f"data file {str(path)!r} names a column twice: {', '.join(header)}")


def _quoted(path: Path, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    spaced = _is_spaced(path, delimiter)
    with _open(path, newline="") as file:
        taken: list[str] = []

        def noted() -> Iterator[str]:
            for line in file:
                taken.append(line)
                yield line

        def checked() -> Iterator[list[str]]:
            for cells in reader:
                raw = "".join(taken)
                taken.clear()
                if not spaced and any(map(_SPACED.fullmatch, cells)) and re.search(rf'(?:^|{delimiter}) +"', raw):
                    raise DataError(
                        f"line {reader.line_num} of {str(path)!r} has a space in front of a quoted cell, so the quotes "
                        "would be part of its text; remove the space"
                    )
                yield cells

        reader = csv.reader(noted(), delimiter=delimiter, strict=True, skipinitialspace=spaced)
        try:
            yield from _rows(path, checked(), lambda: reader.line_num)
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {str(path)!r}: {error}") from error


def _is_spaced(path: Path, delimiter: str) -> bool:
    """Whether a file's writer put a space behind each comma, as its first line tells: it is no part of the cells."""
    with _open(path, newline="") as file:
        try:
            header = next(csv.reader(file, delimiter=delimiter, strict=True), [])
        except csv.Error:
            return False
    return len(header) > 1 and all(name.startswith(" ") for name in header[1:])


def _csv(path: Path) -> Iterator[Record]:
    return _quoted(path, ",")


def _tsv(path: Path) -> Iterator[Record]:
    """Cells between tabs: with CSV's quotes where the file was written with them, else every quote is text."""
    if _has_quoted_cells(path):
        yield from _quoted(path, "\t")
        return
    number = 0
    with _open(path) as file:

        def cells() -> Iterator[list[str]]:
            nonlocal number
            for line in file:
                number += 1
                yield line.rstrip("\n").split("\t") if line.strip("\n") else []

        yield from _rows(path, cells(), lambda: number)


def _has_quoted_cells(path: Path) -> bool:
    """Whether a program that quotes cells wrote this file: written its way again, every row is the same.

    Nothing but the whole file can tell: a text that begins with a quotation mark looks like a quoted cell. Where each
    line is a row by itself, quotes that would join lines are text.
    """

    def always(cell: str) -> bool:
        return True

    def words(cell: str) -> bool:
        return _NUMBER.fullmatch(cell) is None

    def needed(cell: str) -> bool:
        return any(sign in cell for sign in '"\t\r\n')

    def excel(cell: str) -> bool:
        return needed(cell) or "," in cell

    styles: list[Callable[[str], bool]] = [needed, excel, always, words]
    found = joined = False
    lines_are_rows = True
    with _open(path, newline="") as file:
        taken: list[str] = []

        def noted() -> Iterator[str]:
            for line in file:
                taken.append(line)
                yield line

        csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
        width = 0
        try:
            for cells in csv.reader(noted(), delimiter="\t", strict=True):
                raw = "".join(taken).rstrip("\r\n")
                taken.clear()
                width = width or len(cells)
                if cells and len(cells) != width:
                    return False
                joined |= "\n" in raw
                lines_are_rows &= all(line.count("\t") == width - 1 for line in raw.split("\n") if line)
                found = found or '"' in raw
                styles = [style for style in styles if _written(cells, style) == raw]
                if not styles:
                    return False
        except csv.Error:
            return False
    return found and not (joined and lines_are_rows)


def _written(cells: Sequence[str], quotes: Callable[[str], bool]) -> str:
    doubled = ((cell, cell.replace('"', '""')) for cell in cells)
    return "\t".join(f'"{text}"' if quotes(cell) else cell for cell, text in doubled)


def _json_lines(path: Path, *, keep_broken: bool = False) -> Iterator[Record]:
    with _open(path, escape=keep_broken) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _json_record(line, f"line {number} of {str(path)!r}")
            except DataError as error:
                if not keep_broken:
                    raise
                yield BrokenRecord(str(error))


def _json_record(line: str, where: str) -> Record:
    if (found := _NO_UTF8.search(line)) is not None:
        raise DataError(f"{where} is not UTF-8 text (byte 0x{ord(found[0]) - 0xDC00:02x}); save it as UTF-8")
    try:
        record = strict_json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object but {type(record).__name__}")
    return record


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError("parquet files need pyarrow: pip install 'edgeprompt[tune]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_header(path, schema.names)
            batches = file.iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            types = {field.name: {"dtype": str(field.type)} for field in schema}
            yield from with_names(rows, {**types, **(_features(schema.metadata or {}) or {})})
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read parquet file {str(path)!r}: {' '.join(str(error).split())}") from error


def parquet_columns(path: Path) -> Any:
    """The columns of a parquet file as its records have them: an Arrow schema with names in place of class ids.

    Raises:
        DataError: the file is broken.
    """
    import pyarrow
    from pyarrow import parquet

    def named(kind: Any) -> Any:
        return pyarrow.list_(named(kind.value_type)) if hasattr(kind, "value_type") else pyarrow.string()

    schema = parquet.read_schema(path)
    features = _features(schema.metadata or {}) or {}
    return pyarrow.schema(
        field.with_type(named(field.type)) if _class_names(features.get(field.name)) else field for field in schema
    )


def _features(metadata: Mapping[bytes, bytes]) -> Any:
    """What the datasets library says about the columns of a parquet file that it wrote."""
    try:
        features = strict_json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return None
    return features if isinstance(features, Mapping) else None


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
"""How to read a file, by its suffix."""
