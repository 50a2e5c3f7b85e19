"""Files for Ray Data, without a cluster: what is read, what tells rows apart, and what is written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from ray.data.block import BlockAccessor

from edgeprompt.errors import DataError, InputError
from edgeprompt.ray.files import LINE, RECORD, ROW, AnswerFiles, read_blocks, row_ids
from edgeprompt.ray.run import Job, _check_columns, _execute, _schema, find_files
from tests.ray.conftest import make_records


def job(source: Path, out: Path, **fields: Any) -> Job:
    return Job(source, out, "package", {}, **fields)


def test_rows_are_told_apart_by_file_and_place(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("".join(json.dumps({"text": "same"}) + "\n" for _ in range(3000)), "utf-8")
    blocks = [block for path in paths for block in read_blocks(str(path), None)]
    ids = np.concatenate([block.column(ROW).to_numpy() for block in blocks])
    assert (len(ids), len(np.unique(ids))) == (6000, 6000)
    again = np.concatenate([block.column(ROW).to_numpy() for block in read_blocks(str(paths[0]), None)])
    assert (ids[:3000] == again).all()
    assert (row_ids("/x", 5, 2) == row_ids("/x", 0, 7)[5:]).all()


def test_records_come_as_every_command_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('id,text\n007,null\nNA,"two\nlines"\n', "utf-8")
    (block,) = read_blocks(str(path), "id")
    assert block.column("id").to_pylist() == ["007", "NA"]
    records = [json.loads(one) for one in block.column(RECORD).to_pylist()]
    assert records == [{"id": "007", "text": "null"}, {"id": "NA", "text": "two\nlines"}]
    with pytest.raises(DataError, match=r"row 1 of '.*in.csv' has no column 'key'"):
        [*read_blocks(str(path), "key")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_lines_become_a_file(tmp_path: Path, suffix: str) -> None:
    records = make_records(50)
    lines = [json.dumps(record) for record in records]
    block = BlockAccessor.for_block(pyarrow.table({ROW: row_ids("/x", 0, 50), LINE: lines}))
    file = io.BytesIO()
    AnswerFiles(str(tmp_path), suffix, without=None).write_block_to_file(block, file)
    text = file.getvalue().decode()
    if suffix == ".jsonl":
        assert [json.loads(line) for line in text.splitlines()] == records
    else:
        delimiter = "," if suffix == ".csv" else "\t"
        found = [*csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)]
        assert found == [{**record, "text": record["text"] or ""} for record in records]


def test_half_of_a_surrogate_pair_is_kept_or_told(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a\\ud83d", "n": "\u00e4"}\n', "utf-8")
    (read,) = read_blocks(str(path), None)
    block = BlockAccessor.for_block(read.rename_columns([ROW, LINE]))
    file = io.BytesIO()
    AnswerFiles(str(tmp_path), ".jsonl", without=None).write_block_to_file(block, file)
    assert file.getvalue().decode() == '{"text": "a\\ud83d", "n": "\u00e4"}\n'
    with pytest.raises(DataError, match=r"U\+D83D"):
        AnswerFiles(str(tmp_path), ".csv", without=None).write_block_to_file(block, io.BytesIO())


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    lines = [json.dumps({"a": 1}), json.dumps({"b": 1})]
    block = BlockAccessor.for_block(pyarrow.table({ROW: row_ids("/x", 0, 2), LINE: lines}))
    with pytest.raises(DataError, match="other columns than the first"):
        AnswerFiles(str(tmp_path), ".csv", without=None).write_block_to_file(block, io.BytesIO())


def test_a_parquet_file_has_no_column_of_ours(tmp_path: Path) -> None:
    block = BlockAccessor.for_block(pyarrow.table({ROW: row_ids("/x", 0, 2), "n": [1, 2]}))
    file = io.BytesIO()
    AnswerFiles(str(tmp_path), ".parquet", without=ROW).write_block_to_file(block, file)
    file.seek(0)
    assert pyarrow.parquet.read_table(file).to_pydict() == {"n": [1, 2]}


def test_columns_of_a_parquet_output_are_those_of_the_first_records(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "n": null, "m": null}\n{"text": "b", "n": 1}\n', "utf-8")
    schema = _schema(job(path, tmp_path / "out.parquet"))
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "text": "string", "n": "int64", "m": "string", "prompt": "string", "answer": "string", "score": "string",
        "error": "string",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "empty"), [(".csv", "text\n"), (".csv", ""), (".tsv", "text\n"), (".jsonl", ""), (".parquet", None)]
)
def test_a_file_without_a_record_is_passed_over(tmp_path: Path, suffix: str, empty: str | None) -> None:
    """Spark writes such parts."""
    first, second = tmp_path / f"part-0{suffix}", tmp_path / f"part-1{suffix}"
    if empty is None:
        table = pyarrow.table({"text": ["a"]})
        pyarrow.parquet.write_table(table.slice(1), first)
    else:
        first.write_text(empty, "utf-8")
    with pytest.raises(DataError, match="is empty: it has no row"):
        job(tmp_path, tmp_path / "out.parquet").first_records()
    if empty is None:
        pyarrow.parquet.write_table(table, second)
    else:
        second.write_text('{"text": "a"}\n' if suffix == ".jsonl" else "text\na\n", "utf-8")
    whole = job(tmp_path, tmp_path / "out.parquet")
    assert whole.first_records() == [{"text": "a"}]
    assert _schema(whole).names[:2] == ["text", "prompt"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_called_as_rays_own_is_refused_where_it_would_be_lost(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], ROW: ["mine"]}), source)
    else:
        lines = f"text,{ROW}\na,mine\n" if suffix == ".csv" else json.dumps({"text": "a", ROW: "mine"}) + "\n"
        source.write_text(lines, "utf-8")
    table = job(source, tmp_path / "out.parquet")
    names = () if suffix == ".parquet" else _schema(table).names
    with pytest.raises(InputError, match="has a column 'row_hash', which Ray makes too"):
        _check_columns(table, suffix != ".parquet", names)
    if suffix != ".parquet":  # lines have room for it
        _check_columns(job(source, tmp_path / "out.jsonl"), True, ())


def test_parquet_files_of_other_columns_are_one_line(tmp_path: Path) -> None:
    def read_parquet(paths: list[str], **_: Any) -> None:  # as Ray does before it reads
        pyarrow.unify_schemas([pyarrow.parquet.read_schema(path) for path in paths], promote_options="permissive")

    for index, texts in enumerate((pyarrow.array(["a"]), pyarrow.array(["a"]).dictionary_encode())):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"{index}.parquet")
    ray: Any = SimpleNamespace(data=SimpleNamespace(read_parquet=read_parquet))
    with pytest.raises(DataError, match=r"do not have the same columns .*Field text has incompatible types"):
        _execute(ray, job(tmp_path, tmp_path / "out"), None, tmp_path / "data")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None, None], "2 rows of .* have nothing in column 'id'"),
        ([7, None], "1 rows of .* have nothing in column 'id'"),
        ([{"a": 1}, {"a": 2}], "holds lists or objects"),
        (None, "has no column 'id'; it has: text"),
    ],
)
def test_every_row_of_every_parquet_file_has_an_id(tmp_path: Path, column: list[Any] | None, message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "id": ["x"]}), tmp_path / "a.parquet")
    fine = job(tmp_path, tmp_path / "out", id_column="id", resume=True)
    _check_columns(fine, False, ())
    rows = {"text": ["b"] * len(column or "b"), **({} if column is None else {"id": column})}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=message):
        _check_columns(job(tmp_path, tmp_path / "out", id_column="id", resume=True), False, ())


def test_an_input_is_a_file_or_a_folder_of_one_kind(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "part").mkdir(parents=True)
    for name in ("b.csv", "part/a.csv", "_SUCCESS", ".hidden.csv"):
        (folder / name).write_text("text\na\n", "utf-8")
    assert [path.name for path in find_files(folder)] == ["b.csv", "a.csv"]
    assert job(folder, tmp_path / "out").suffix == ".csv"
    assert job(folder, tmp_path / "out.parquet").suffix == ".parquet"
    (folder / "c.jsonl").write_text("{}", "utf-8")
    with pytest.raises(DataError, match=r"end in \.csv, \.jsonl; give one kind of"):
        find_files(folder)
    with pytest.raises(DataError, match="no data at"):
        find_files(tmp_path / "nothing")


def test_an_output_that_is_there_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text\na\n", "utf-8")
    with pytest.raises(InputError, match="exists already"):
        job(source, tmp_path)
    with pytest.raises(InputError, match=r"ends in '\.xls'"):
        job(source, tmp_path / "out.xls")
