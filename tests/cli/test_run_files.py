"""`run --input --output`: columns are kept, rows that fail are what --on-error says, and long runs are resumed."""

import csv
import datetime
import decimal
import json
import math
import signal
import time

import pytest

WORDS = ("fine", "dull", "loud", "so")


def rows(count):
    return [{"id": f"n{i}", "text": f"{WORDS[i % 4]} film {i}", "answer": "gold", "label": "x"} for i in range(count)]


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.fixture
def command(tiny_llama_package, prompt_folder):
    return ["run", tiny_llama_package, "--prompt", prompt_folder / "sentiment.safetensors"]


@pytest.mark.parametrize("given", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("made", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_of_the_input_stand_beside_the_answers(cli, command, tmp_path, given, made):
    records = rows(5)
    source, out = write(tmp_path / f"in.{given}", records), tmp_path / f"out.{made}"
    result = cli(*command, "--input", source, "--output", out)
    assert result.exit_code == 0, result.stderr
    plain = [line.split("\t")[0] for line in cli(*command, "--input", source).stdout.splitlines()]
    found = read(out)
    assert [row["id"] for row in found] == [record["id"] for record in records]
    assert [row["text"] for row in found] == [record["text"] for record in records]
    if made == "jsonl":  # a result keeps its names; what the input calls so becomes input_NAME
        assert [row["label"] for row in found] == plain
        assert {row["input_label"] for row in found} == {"x"}
    else:
        assert [row["answer"] for row in found] == plain
        assert {row["input_answer"] for row in found} == {"gold"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, out.name])


def typed_table(count=3):
    import pyarrow

    utc = datetime.UTC
    day, moment = datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4, 5, 678901)
    columns = {
        "id": ([2**63 + 1], pyarrow.uint64()),
        "moment": ([moment], pyarrow.timestamp("us")),
        "zoned": ([moment.replace(tzinfo=utc)], pyarrow.timestamp("us", "Europe/Berlin")),
        "day": ([day], pyarrow.date32()),
        "time": ([datetime.time(1, 2, 3)], pyarrow.time64("us")),
        "span": ([datetime.timedelta(seconds=5)], pyarrow.duration("us")),
        "price": ([decimal.Decimal("1.10")], pyarrow.decimal128(10, 2)),
        "small": ([0.1], pyarrow.float32()),
        "tiny": ([7], pyarrow.int8()),
        "bytes": ([b"\xff\x00"], pyarrow.binary()),
        "map": ([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "days": ([[day]], pyarrow.list_(pyarrow.date32())),
        "kind": (["p"], pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        "score": ([1.5], pyarrow.float64()),
        "empty": ([None], pyarrow.null()),
    }
    made = {
        name: pyarrow.array(([*value, None]) * count, kind).slice(0, count) for name, (value, kind) in columns.items()
    }
    return pyarrow.table({"text": ["the film"] * count, **made})


@pytest.mark.parametrize("resume", [False, True])
def test_a_parquet_output_keeps_the_types_of_a_parquet_input(cli, command, tmp_path, monkeypatch, resume):
    """Timestamps, decimals and bytes became text, and an unsigned id of 64 bits was a traceback."""
    import pyarrow.parquet

    source, out, table = tmp_path / "in.parquet", tmp_path / "out.parquet", typed_table(130)
    pyarrow.parquet.write_table(table, source)
    if resume:
        begun(cli, command, source, out, monkeypatch)
    result = cli(*command, "--input", source, "--output", out, *(["--resume"] if resume else []))
    assert result.exit_code == 0, result.stderr
    found = pyarrow.parquet.read_table(out)
    assert found.num_rows == 130
    for name in table.column_names:
        assert found.column("input_score" if name == "score" else name).equals(table.column(name)), name
    assert set(found.column("answer").to_pylist()) <= {"positive", "negative"}
    assert pyarrow.parquet.ParquetFile(out).num_row_groups == 1


def test_dates_are_iso_8601_and_nan_is_null_in_text(cli, command, tmp_path):
    """A moment had a space in its middle, and `NaN` is no JSON."""
    import pyarrow.parquet

    table = typed_table(1).append_column("nan", pyarrow.array([math.nan]))
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    for suffix in ("csv", "jsonl"):
        out = tmp_path / f"out.{suffix}"
        assert cli(*command, "--input", tmp_path / "in.parquet", "--output", out).exit_code == 0
        (row,) = read(out)
        assert (row["moment"], row["zoned"]) == ("2024-01-02T03:04:05.678901", "2024-01-02T04:04:05.678901+01:00")
        assert (row["day"], row["time"], row["price"]) == ("2024-01-02", "01:02:03", "1.10")
        assert str(row["id"]) == "9223372036854775809"
    assert row["nan"] is None
    assert row["days"] == ["2024-01-02"]
    assert "NaN" not in out.read_text("utf-8")


def test_names_of_classes_are_kept_as_names_in_parquet(cli, command, tmp_path):
    import pyarrow.parquet

    label = {"_type": "ClassLabel", "names": ["no", "yes"]}
    features = {"gold": label, "many": {"_type": "Sequence", "feature": label}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table({"text": ["a", "b"], "gold": [1, 0], "many": [[1, 0], []]}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    result = cli(*command, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.stderr
    assert [(row["gold"], row["many"]) for row in read(tmp_path / "out.parquet")] == [
        ("yes", ["yes", "no"]),
        ("no", []),
    ]


@pytest.mark.parametrize("made", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_of_bytes_is_kept(cli, command, tmp_path, made):
    """It was written as the text "b'...'"."""
    records = [{"text": "the film", "image": b"\xff\x00", "all": [b"\x01"]}, {"text": "a", "image": None, "all": []}]
    result = cli(*command, "--input", write(tmp_path / "in.parquet", records), "--output", tmp_path / f"out.{made}")
    assert result.exit_code == 0, result.stderr
    found = read(tmp_path / f"out.{made}")
    image, one = (b"\xff\x00", b"\x01") if made == "parquet" else ("/wA=", "AQ==")
    assert [row["image"] or None for row in found] == [image, None]
    assert found[0]["all"] == ([one] if made in ("jsonl", "parquet") else '["AQ=="]')


def bad_rows():
    records = rows(6)
    records[1]["text"] = "word " * 5000
    records[4]["text"] = None
    return records


def test_rows_that_fail_stop_or_are_left_out_or_recorded(cli, refused, command, tmp_path):
    source = write(tmp_path / "in.jsonl", bad_rows())
    args = (*command, "--input", source, "--output")
    assert refused(*args, tmp_path / "stop.csv").startswith("row 2: ")
    assert not (tmp_path / "stop.csv").exists()
    result = cli(*args, tmp_path / "skip.csv", "--on-error", "skip")
    assert result.exit_code == 0
    assert result.stderr.startswith("note: 2 answers failed and were left out; the first: row 2: ")
    assert [row["id"] for row in read(tmp_path / "skip.csv")] == ["n0", "n2", "n3", "n5"]
    for suffix in ("csv", "jsonl", "parquet"):
        result = cli(*args, tmp_path / f"record.{suffix}", "--on-error", "record")
        assert result.exit_code == 0, result.stderr
        found = read(tmp_path / f"record.{suffix}")
        assert [row["id"] for row in found] == [f"n{i}" for i in range(6)]
        assert [bool(row["error"]) for row in found] == [False, True, False, False, True, False]
        assert "row 5 has nothing in column 'text'" in found[4]["error"]


def test_a_column_that_later_rows_have_is_not_lost(cli, refused, command, tmp_path):
    some = [{"id": i, "text": "fine", "n": None} for i in range(1030)]
    some += [{"id": 1030, "text": "dull", "n": 3, "more": "kept"}, {"id": 1.5, "text": "so", "n": 2.5}]
    source, out = write(tmp_path / "in.jsonl", some), tmp_path / "out.parquet"
    assert cli(*command, "--input", source, "--output", out).exit_code == 0
    found = read(out)
    assert [(row["id"], row["n"], row["more"]) for row in found[-3:]] == [
        (1029, None, None),
        (1030, 3, "kept"),
        (1.5, 2.5, None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "made", "says"),
    [
        ("in.jsonl", '{"text": "a"}\n{"text": "b", "id": 1}\n{"te\n', "out.csv", "row 2 has other columns"),
        ("in.csv", "id,text\n1,a\n2\n", "out.csv", "line 3"),
        ("in.jsonl", '{"text": "a"}\n{"text": "b", "id": 1}\n', "out.csv", "row 2 has other columns"),
        ("in.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": [1]}\n', "out.parquet", "the columns are no table"),
        ("in.jsonl", '{"text": "a", "id": 18446744073709551615}\n', "out.parquet", "int too large"),
    ],
)
def test_what_ends_a_run_is_told_before_it(refused, command, tmp_path, monkeypatch, name, text, made, says):
    source = tmp_path / name
    source.write_text(text)
    monkeypatch.setattr("edgeprompt.load", lambda *_, **__: pytest.fail("the package was loaded"))
    args = (*command, "--input", source, "--output", tmp_path / made, "--on-error", "skip")
    assert says in refused(*args)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_line_that_is_no_record_is_what_on_error_says(cli, refused, command, tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [
        b'{"te',
        b'{"id": "n1", "text": "fine"}',
        b"[1]",
        b"",
        b'{"id": "n2", "text": "\xff"}',
        b'{"id": "n3", "text": "so"}',
    ]
    source.write_bytes(b"\n".join(lines))
    args = (*command, "--input", source, "--output")
    assert "is not UTF-8 text" in refused(*args, tmp_path / "stop.jsonl")
    skipped = cli(*args, tmp_path / "skip.csv", "--on-error", "skip", "--resume")
    assert skipped.exit_code == 0, skipped.stderr
    assert "note: 3 answers failed and were left out; the first: row 1: line 1 of " in skipped.stderr
    assert [row["id"] for row in read(tmp_path / "skip.csv")] == ["n1", "n3"]
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        result = cli(*args, tmp_path / f"record.{suffix}", "--on-error", "record")
        assert result.exit_code == 0, result.stderr
        found = read(tmp_path / f"record.{suffix}")
        assert [row.get("id") or None for row in found] == [None, "n1", None, None, "n3"]
        said = [row["error"] or "" for row in found]
        assert [bool(one) for one in said] == [True, False, True, True, False]
        assert "line 1 of " in said[0]
        assert "line 3 of " in said[2]
        assert "no JSON object but list" in said[2]
        assert "line 5 of " in said[3]
        assert "is not UTF-8 text (byte 0xff)" in said[3]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("in.csv.gz", b"\x1f\x8b", "ends in '.gz'; decompress it first"),
        ("in.csv", b"\x1f\x8b\x08\x00", "is compressed with gzip; decompress it first"),
        ("in.jsonl", b"\x1f\x8b\x08\x00", "is compressed with gzip; decompress it first"),
    ],
)
def test_compressed_data_is_told(refused, command, tmp_path, name, data, says):
    source = tmp_path / name
    source.write_bytes(data)
    assert says in refused(*command, "--input", source)


def test_a_dash_is_no_file(refused, command, tmp_path, monkeypatch):
    source = write(tmp_path / "in.csv", rows(2))
    monkeypatch.chdir(tmp_path)
    assert "leave out the option to write to stdout" in refused(*command, "--input", source, "--output", "-")
    assert "pipe lines into stdin, without --input" in refused(*command, "--input", "-")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_folder_of_prompts_that_is_not_there_is_told_before_the_work(refused, command, tmp_path, monkeypatch):
    source, place = write(tmp_path / "in.csv", rows(2)), tmp_path / "no"
    monkeypatch.setattr("edgeprompt.load", lambda *_, **__: pytest.fail("the package was loaded"))
    args = (*command, "--input", source, "--prompts", place, "--prompt-column", "label")
    assert refused(*args) == f"no folder of prompts at {str(place)!r}"


@pytest.mark.parametrize("made", ["csv", "jsonl", "parquet"])
def test_a_killed_run_goes_on_without_a_row_lost_or_doubled(cli, spawn, refused, command, tmp_path, made):
    source, out = write(tmp_path / "in.csv", rows(640)), tmp_path / f"out.{made}"
    args = (*command, "--input", source, "--output", out, "--resume")
    slow = "import time; from edgeprompt.runtime import Runtime; plain = Runtime.run\n"
    slow += (
        "def run(self, *args, **keywords): time.sleep(0.3); return plain(self, *args, **keywords)\nRuntime.run = run"
    )
    with spawn(*args, before=slow) as process:
        journal, deadline = tmp_path / f"out.{made}.part.json", time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and json.loads(journal.read_text())["records"] >= 128:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    part = tmp_path / f"out.{made}.part"
    with part.open("ab") as file:
        file.write(b"half a ro")  # as a crash may leave it
    for other in ("--truncate", "--json", "--drafts"):
        assert "was begun with another" in refused(*args, other)
    same = source.read_bytes()
    source.write_bytes(same.replace(b"fine", b"dull"))  # as long as it was
    assert "was begun with another" in refused(*args)
    source.write_bytes(same)
    result = cli(*args)
    assert result.exit_code == 0, result.stderr
    whole = tmp_path / f"whole.{made}"
    assert cli(*command, "--input", source, "--output", whole).exit_code == 0
    assert [row["id"] for row in read(out)] == [f"n{i}" for i in range(640)]
    if made != "jsonl":  # JSON lines have timings
        assert read(out) == read(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, out.name, whole.name])


def test_what_resuming_needs(cli, refused, command, tmp_path):
    source = write(tmp_path / "in.csv", rows(2))
    assert "--resume needs --input and --output" in cli(*command, "--input", source, "--resume").stderr
    (tmp_path / "out.csv.part").write_text("my notes")
    assert "move it away" in refused(*command, "--input", source, "--output", tmp_path / "out.csv", "--resume")
    assert (tmp_path / "out.csv.part").read_text() == "my notes"


@pytest.mark.slow
@pytest.mark.parametrize(("given", "made"), [("csv", "csv"), ("jsonl", "parquet"), ("parquet", "jsonl")])
def test_memory_does_not_grow_with_the_file(spawn, command, tmp_path, given, made):
    def peak(count):
        names = ["sentiment" if i % 50 == 0 else "unknown" for i in range(count)]  # unknown: fails fast
        records = [{**record, "kind": name, "note": "x" * 40} for record, name in zip(rows(count), names, strict=True)]
        source, out = write(tmp_path / f"{count}.{given}", records), tmp_path / f"out{count}.{made}"
        high = "[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]"
        before = f"import atexit, sys; atexit.register(lambda: print({high}, file=sys.stderr))"
        arguments = (*command, "--input", source, "--output", out, "--on-error", "record", "--prompt-column", "kind")
        with spawn(*arguments, before=before) as process:
            _, error = process.communicate(timeout=1200)
        assert process.returncode == 0, error
        assert f"{count - count // 50} answers failed and were recorded" in error
        assert len(read(out)) == count
        return int(error.splitlines()[-1]) / 1024

    small, large = peak(20_000), peak(200_000)
    assert large < small + 32, f"MiB: {small:.0f} at 20,000 rows, {large:.0f} at 200,000"


def test_a_file_of_somebody_else_is_kept(cli, refused, tiny_llama_package, tmp_path):
    command = ("run", tiny_llama_package, "the film", "--max-new-tokens", "1", "--output")
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    assert "give --force" in refused(*command, notes)
    assert notes.read_text() == "mine\n"
    assert cli(*command, notes, "--force").exit_code == 0
    for name in ("a.jsonl", "a.csv", "a.tsv"):
        for _ in range(2):
            assert cli(*command, tmp_path / name).exit_code == 0


def test_half_of_a_surrogate_pair_is_kept_or_told(cli, refused, tiny_llama_package, tmp_path):
    """Before, a column of the input with one had "?" in the output."""
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "the film", "id": "a\\ud83d"}\n')
    command = ("run", tiny_llama_package, "--input", source, "--max-new-tokens", "1", "--output")
    assert cli(*command, tmp_path / "out.jsonl").exit_code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == "a\ud83d"
    for name in ("out.csv", "out.parquet"):
        assert "U+D83D" in refused(*command, tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("made", ["csv", "tsv"])
def test_a_lone_carriage_return_in_a_cell_is_no_end_of_a_row(cli, command, tmp_path, made):
    records = [{**record, "label": "a\rb"} for record in rows(2)]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / f"out.{made}"
    assert cli(*command, "--input", source, "--output", out).exit_code == 0
    assert [row["label"] for row in read(out)] == ["a\rb"] * 2
    again = tmp_path / "again.jsonl"
    assert cli(*command, "--input", out, "--output", again).exit_code == 0
    assert [row["id"] for row in read(again)] == ["n0", "n1"]


@pytest.mark.parametrize("on_error", ["stop", "skip", "record"])
def test_a_column_that_no_record_has_is_told_before_the_answers(
    refused, tiny_llama_package, command, prompt_folder, tmp_path, on_error
):
    records = [{"id": i, "body": "fine", "task": "sentiment", "other": "nothing"} for i in range(3)]
    folder, out = ("--prompts", prompt_folder), tmp_path / "out.csv"
    base = ["run", tiny_llama_package]
    for suffix in ("jsonl", "csv", "parquet"):
        source = write(tmp_path / f"in.{suffix}", records)
        shared = ("--input", source, "--output", out, "--on-error", on_error)
        body = ("--text-column", "body")
        no_tsak = "has no column 'tsak' (the names of prompts)"
        for given, says in (
            ((*command, *shared), f"'{source}' has no column 'text', which prompt 'sentiment' asks for; it has: id"),
            ((*base, *shared), f"'{source}' has no column 'text'; it has: id"),
            (
                (*base, *folder, *shared, *body, "--prompt-column", "tsak"),
                "has no column 'tsak' (the names of prompts)",
            ),
            ((*command, *shared, *body, "--prompt-column", "tsak"), no_tsak),
            ((*base, *folder, *shared, *body, "--prompt-column", "other"), "names no prompt that there is"),
            ((*command, *shared, *body, "--prompt-column", "other"), "it holds 'nothing'; given with --prompt: sent"),
        ):
            assert says in refused(*given)
            assert not out.exists()


def test_one_name_that_is_a_prompt_is_enough(cli, tiny_llama_package, prompt_folder, tmp_path):
    records = [{"text": "fine", "task": task} for task in ("nothing", "sentiment", "")]
    source, out = write(tmp_path / "in.csv", records), tmp_path / "out.csv"
    args = ("--input", source, "--output", out, "--on-error", "record", "--prompt-column", "task")
    for given in (("--prompts", prompt_folder), ("--prompt", prompt_folder / "sentiment.safetensors")):
        assert cli("run", tiny_llama_package, *given, *args).exit_code == 0
        assert [bool(row["error"]) for row in read(out)] == [True, False, True]


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupted_parquet_file_leaves_nothing(cli, command, tmp_path, monkeypatch, resume):
    import pyarrow.parquet

    source, out = write(tmp_path / "in.csv", rows(4)), tmp_path / "out.parquet"

    def stopped(*_args, **_keywords):
        raise SystemExit(143)

    args = (*command, "--input", source, "--output", out, *(["--resume"] if resume else []))
    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.parquet.ParquetWriter, "write_table", stopped)
        assert cli(*args).exit_code == 143
    left = {path.name for path in tmp_path.iterdir()} - {source.name}
    assert left == ({"out.parquet.part", "out.parquet.part.json"} if resume else set())
    assert cli(*args).exit_code == 0
    assert len(read(out)) == 4


def begun(cli, command, source, out, monkeypatch):
    """The files of a run that was stopped behind its first 64 records."""
    from edgeprompt.cli.output import Table

    plain = Table.write

    def write(self, *args):
        plain(self, *args)
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "write", write)
        assert cli(*command, "--input", source, "--output", out, "--resume").exit_code == 143
    return out.with_name(out.name + ".part")


def test_a_part_that_lost_its_end_is_not_filled_with_zeros(cli, refused, command, tmp_path, monkeypatch):
    source, out = write(tmp_path / "in.csv", rows(80)), tmp_path / "out.csv"
    part = begun(cli, command, source, out, monkeypatch)
    part.write_bytes(part.read_bytes()[:-100])
    assert "is shorter than its journal says" in refused(*command, "--input", source, "--output", out, "--resume")


def test_two_runs_do_not_write_one_file(cli, refused, command, tmp_path, monkeypatch):
    import fcntl

    source, out = write(tmp_path / "in.csv", rows(80)), tmp_path / "out.csv"
    part = begun(cli, command, source, out, monkeypatch)
    args = (*command, "--input", source, "--output", out, "--resume")
    with part.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another run writes" in refused(*args)
    assert cli(*args).exit_code == 0
    assert len(read(out)) == 80


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("a.jsonl", b"", 0),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}', 2),
        ("a.csv", b"text\n", 0),
        ("a.csv", b"text\na\nb", 2),
        ("a.csv", b"text\na\nb\n", 2),
    ],
)
def test_empty_files_and_last_lines_without_an_end_are_counted_rightly(tmp_path, name, data, rows):
    from edgeprompt.cli.serving import count_records

    file = tmp_path / name
    file.write_bytes(data)
    assert count_records(file) == rows
