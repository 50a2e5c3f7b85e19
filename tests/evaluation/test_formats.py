"""What files say: quotes of tables, encodings, JSON, and class ids whose names the data carries."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import text_of
from edgeprompt.evaluation.data import read_records
from edgeprompt.evaluation.formats import read_lines


def written(tmp_path: Path, text: str, name: str = "d.tsv", encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


QUOTES_ARE_TEXT = {
    "open": 'text\tlabel\n"Great movie\tpos\nnothing"\tneg\nlast\tpos\n',
    "closed": 'text\tlabel\n"Great movie"\tpos\n"Bad"\tneg\nplain\tneg\n',
    "before more": 'text\tlabel\n"Great" movie, said he\tpos\nplain\tneg\n',
    "pairs": 'text\tlabel\n""quoted""\tpos\nplain\tneg\n',
    "one with a comma": 'text\tlabel\n"Well, well"\tpos\nso, so\tneg\n',
    "crlf": 'text\tlabel\r\n"Great movie\tpos\r\n"\tneg\r\n',
}


@pytest.mark.parametrize("text", QUOTES_ARE_TEXT.values(), ids=QUOTES_ARE_TEXT)
def test_quotes_in_tsv_are_text_where_nobody_quoted_cells(tmp_path: Path, text: str) -> None:
    rows = [line.split("\t") for line in text.replace("\r\n", "\n").splitlines()]
    found = list(read_records(written(tmp_path, text)))
    assert found == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


CELLS = ["plain", 'say "hi"', "a\ttab", "two\nlines", '"whole"', "com,ma", ""]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_cells_of_tsv_are_read_as_their_writer_meant(tmp_path: Path, quoting: Any, end: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(
        [["text", "label"], *([cell, str(number)] for number, cell in enumerate(CELLS))]
    )
    found = [record["text"] for record in read_records(written(tmp_path, file.getvalue()))]
    assert found == CELLS


def test_what_pandas_and_excel_write_as_tsv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "d.tsv"
    pandas.DataFrame({"text": CELLS[:-1], "label": "a"}).to_csv(path, sep="\t", index=False)
    assert [record["text"] for record in read_records(path)] == CELLS[:-1]
    excel = 'text\tlabel\r\n"com,ma"\ta\r\n"say ""hi"""\tb\r\nplain\tb\r\n'
    assert [r["text"] for r in read_records(written(tmp_path, excel))] == ["com,ma", 'say "hi"', "plain"]


def test_csv_quotes_never_merge_rows_in_silence(tmp_path: Path) -> None:
    path = written(tmp_path, 'text,label\n"Great,pos\n"Bad movie,neg\n', "d.csv")
    with pytest.raises(DataError, match="line 3 of"):
        list(read_records(path))


def test_a_space_before_a_quoted_cell_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 'text,label\n"well, yes",pos\n"no", "neg"\n', "d.csv")
    with pytest.raises(DataError, match=r"line 3 of .* a space in front of a quoted cell"):
        list(read_records(path))
    quoted = written(tmp_path, 'text,label\n" ""hi"", he said",pos\n" ""hi""",pos\n', "d.csv")
    assert [record["text"] for record in read_records(quoted)] == [' "hi", he said', ' "hi"']


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32"])
@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "lines"])
def test_byte_order_marks_say_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("-bom") else ""
    body = {
        "d.csv": "text\r\nné\r\n日本\r\n",
        "d.tsv": "text\r\nné\r\n日本\r\n",
        "d.jsonl": '{"text": "né"}\r\n{"text": "日本"}\r\n',
        "lines": "né\r\n日本\r\n",
    }[name]
    path = written(tmp_path, mark + body, name, encoding.removesuffix("-bom"))
    if name == "lines":
        with path.open("rb") as file:
            found = list(read_lines(file, "stdin"))
    else:
        found = list(read_records(path))
    assert [record["text"] for record in found] == ["né", "日本"]


def test_lines_end_where_any_system_ends_them() -> None:
    found = [record["text"] for record in read_lines(io.BytesIO(b"a\r\nb\rc\n\nd"), "stdin")]
    assert found == ["a", "b", "c", "", "d"]
    with pytest.raises(DataError, match="stdin is empty"):
        list(read_lines(io.BytesIO(b""), "stdin"))
    with pytest.raises(DataError, match="behind line 0"):
        list(read_lines(io.BytesIO(b"\xff\n"), "stdin"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"label": NaN}', "NaN is not allowed"),
        ('{"label": -Infinity}', "-Infinity is not allowed"),
        ('{"label": 1e999}', "too large"),
        ('{"label": "a", "label": "b"}', "duplicate key 'label'"),
    ],
)
def test_json_that_means_nothing_certain(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=f"line 2 of .*{message}"):
        list(read_records(written(tmp_path, '{"label": "a"}\n' + line + "\n", "d.jsonl")))


def as_parquet(folder: Path, rows: list[dict[str, Any]], features: Any) -> Any:
    import datasets

    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "d.parquet")
    return folder / "d.parquet"


def in_memory(folder: Path, rows: list[dict[str, Any]], features: Any) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows, features=features)


def by_id(folder: Path, rows: list[dict[str, Any]], features: Any) -> Any:
    (folder / "set").mkdir()
    as_parquet(folder, rows, features).rename(folder / "set" / "train.parquet")
    return f"{folder.name}/set:train"


def plain_parquet(folder: Path, rows: list[dict[str, Any]], features: Any) -> Any:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema), folder / "d.parquet")
    return folder / "d.parquet"


def of_numpy(folder: Path, rows: list[dict[str, Any]], features: Any) -> Any:
    import numpy as np

    return [{name: np.dtype(features[name].dtype).type(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("give", [as_parquet, in_memory, by_id, plain_parquet, of_numpy])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_have_the_digits_that_were_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, give: Callable[..., Any], dtype: str
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path.parent)
    features = datasets.Features({"text": datasets.Value(dtype)})
    data = give(tmp_path, [{"text": 0.1}, {"text": 2.5}], features)
    found = [text_of(record, "text", "row") for record in read_records(data)]
    assert found == ["0.1", "2.5"]


@pytest.mark.parametrize("give", [as_parquet, in_memory, by_id])
def test_class_ids_become_the_names_that_the_data_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, give: Callable[..., Any]
) -> None:
    import datasets

    kinds, tags = datasets.ClassLabel(names=["neg", "pos"]), datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": kinds, "several": [kinds], "ner_tags": datasets.List(tags)}
    )
    rows = [
        {"text": "a", "label": 1, "several": [0, 1], "ner_tags": [1, 0]},
        {"text": "b", "label": -1, "several": [], "ner_tags": [0]},
    ]
    monkeypatch.chdir(tmp_path.parent)
    found = list(read_records(give(tmp_path, rows, features)))
    assert found == [
        {"text": "a", "label": "pos", "several": ["neg", "pos"], "ner_tags": ["B-PER", "O"]},
        {"text": "b", "label": None, "several": [], "ner_tags": ["O"]},
    ]


def test_a_class_id_without_a_name_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    features = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"label": [0, 5]}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row 2: column 'label' holds class 5, and the data names 2: neg, pos"):
        list(read_records(tmp_path / "d.parquet"))
    twice = pyarrow.table([[1], [2]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="names a column twice"):
        list(read_records(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    "said",
    [{"info": {"features": [1]}}, {"info": {"features": {"label": {"names": "np", "_type": "ClassLabel"}}}}, [], 1],
)
def test_features_that_are_none_name_nothing(tmp_path: Path, said: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"label": [1]}).replace_schema_metadata({"huggingface": json.dumps(said)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert list(read_records(tmp_path / "d.parquet")) == [{"label": 1}]


def test_a_space_behind_every_comma_is_no_part_of_the_cells(tmp_path: Path) -> None:
    path = written(tmp_path, 'label, text, id\npos, great, 1\nneg, "so, so",2\npos," kept", 3\n', "d.csv")
    assert [record["text"] for record in read_records(path)] == ["great", "so, so", " kept"]
    plain = written(tmp_path, "label,text\npos, great\n", "p.csv")
    assert [record["text"] for record in read_records(plain)] == [" great"]
