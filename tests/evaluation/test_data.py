"""Reading data: every format, streamed, and one clear line for what cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprompt.errors import DataError
from edgeprompt.evaluation.data import column_names, data_hash, read_records

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'com,ma "quote" \n line', "label": "b"},
    {"text": "émoji 🙂", "label": "a"},
]


def write_csv(path: Path, delimiter: str = ",") -> Path:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.csv", write_csv),
        ("d.tsv", lambda path: write_csv(path, "\t")),
        ("d.jsonl", write_jsonl),
        ("d.parquet", write_parquet),
        ("d.CSV", write_csv),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / name)
    assert list(read_records(path, columns=["text", "label"])) == ROWS
    assert column_names(path) == ["text", "label"]
    assert data_hash(path) == data_hash(str(path))


def test_byte_order_mark_and_rows_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\nhi,a\r\n")
    assert list(read_records(path)) == [{"text": "hi", "label": "a"}]
    assert list(read_records(ROWS)) == ROWS
    assert data_hash(ROWS) != data_hash(ROWS[:2])


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "first"}\nnot json\n')
    rows = read_records(path)
    assert next(rows) == {"text": "first"}
    with pytest.raises(DataError, match=r"line 2 of .* is no JSON"):
        next(rows)


def test_a_dataset_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sets" / "toy"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is a folder"):
        list(read_records("sets/toy"))
    assert [row["text"] for row in read_records("sets/toy:test")] == [row["text"] for row in ROWS]


BAD = [
    ("d.csv", b"", "is empty"),
    ("d.csv", b"text,label\n", "is empty"),
    ("d.jsonl", b"\n", "is empty"),
    ("d.csv", b"text,label\na,b,c\n", "line 2 of .* has 3 columns, the first line names 2"),
    ("d.csv", b"text,text\na,b\n", "names a column twice"),
    ("d.csv", b'text,label\n"open,b\n', "line 2 of .*unexpected end of data"),
    ("d.csv", "text,label\nna\u00efve,b\n".encode("latin-1"), "is not UTF-8 text"),
    ("d.jsonl", b"[1]\n", "line 1 of .* is no JSON object but list"),
    ("d.jsonl", b"\xff\xfe\n", "is not UTF-8 text"),
    ("d.parquet", b"PAR1 and nothing else", "cannot read parquet file"),
    ("d.xlsx", b"", r"ends in '.xlsx'; known: .csv, .tsv, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.csv", "no data file at 'missing.csv'"),
        ("./missing", "no data file at './missing'"),
        ("no/such-dataset", "no data file at 'no/such-dataset', and no dataset of that id"),
    ],
)
def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        list(read_records(source))


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv")
    with pytest.raises(DataError, match=r"has no column 'target' \(row 1\); it has: text, label"):
        list(read_records(path, columns=["target"]))
    with pytest.raises(DataError, match="row 2 of 'rows' has nothing in column 'label'"):
        list(read_records([{"label": "a"}, {"label": None}], columns=["label"]))


def test_imports_no_torch_pyarrow_or_datasets() -> None:
    heavy = "{'torch', 'pyarrow', 'datasets', 'transformers'}"
    code = f"import sys, edgeprompt.evaluation.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
