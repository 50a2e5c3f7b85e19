"""`edgeprompt run --engine ray`: what is refused before a cluster starts, and (slow) real runs on a local cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from edgeprompt.cli import main
from edgeprompt.ray.run import _line
from tests.cli.test_run_files import read, write
from tests.ray.conftest import make_records

COUNT = 1200


def arguments(package: Path, tasks: Path, source: Path, out: Path, *more: Any) -> list[str]:
    fixed = ["run", package, "--prompts", tasks, "--prompt-column", "task", "--max-new-tokens", 3]
    return [str(one) for one in (*fixed, "--input", source, "--output", out, *more)]


def refused(*given: Any) -> str:
    result = CliRunner().invoke(main, [str(one) for one in given])
    assert result.exit_code in (1, 2), result.output
    return result.stderr


def test_what_a_cluster_cannot_do_is_said_before_it_starts(
    tiny_llama_package: Path, tasks: Path, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "in.csv", make_records(3)), tmp_path / "out"
    plain = ["run", tiny_llama_package, "--input", source]
    ray = [*plain, "--output", out, "--engine", "ray"]
    assert "needs --input and a new --output" in refused(*plain, "--engine", "ray")
    assert "need --engine ray" in refused(*plain, "--actors", "2")
    assert "--prompts needs --prompt-column" in refused(*plain, "--prompts", tasks)
    assert "give a number, or MIN:MAX" in refused(*ray, "--actors", "many")
    two = ("--prompt", tasks / "task1.safetensors", "--prompt", tasks / "task3.safetensors")
    assert "answers a record once" in refused(*ray, *two)
    assert "no prompt file 'nothing'" in refused(*ray, "--prompt", "nothing")
    assert "no folder of prompts" in refused(*ray, "--prompts", tmp_path / "none", "--prompt-column", "task")
    assert "has files that end in" in refused(*plain[:-1], tiny_llama_package, "--output", out, "--engine", "ray")
    folder = ("--prompts", tasks, "--prompt-column")
    assert "has no column 'tsak' (the names of prompts)" in refused(*ray, *folder, "tsak")
    assert "has no column 'txet'" in refused(*ray, "--text-column", "txet")
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert f"no Ray cluster at {address!r}: Connection refused" in refused(*ray, "--address", address)
    assert "no Ray cluster at 'ray://nowhere.invalid:1': " in refused(*ray, "--address", "ray://nowhere.invalid:1")
    out.mkdir()
    assert "exists already" in refused(*ray)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out"]


def test_a_folder_of_prompts_answers_here_too(tiny_llama_package: Path, tasks: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", make_records(60))
    out = tmp_path / "out.csv"
    args = arguments(tiny_llama_package, tasks, source, out, "--on-error", "record")
    assert CliRunner().invoke(main, args).exit_code == 0
    rows = read(out)
    assert {row["prompt"] for row in rows} == {"", *(f"task{i}" for i in range(8))}
    assert [bool(row["error"]) for row in rows] == [i % 40 == 0 or i % 50 == 0 for i in range(60)]


def test_of_a_traceback_the_first_error_is_told() -> None:
    told = (
        'ray::MapWorker() (pid=1)\n  File "pyarrow/table.pxi"\npyarrow.lib.ArrowInvalid: no\nOSError: disk full\n\n'
        "The above exception was the direct cause of the following exception:\n\nray::MapWorker() (pid=1)\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\nTo change retry attempts, ask Ray."
    )
    assert _line(RuntimeError(told)) == "OSError: disk full"
    assert _line(RuntimeError("one\ntwo\n")) == "two"
    assert _line(RuntimeError()) == "RuntimeError"


# What follows starts Ray.


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """`start(...)`: the command as a process of its own, with a cluster of its own."""
    started: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def begin(args: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgeprompt", *args]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    return err


def parts(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.iterdir()) for row in read(path)]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same answers to the same records, each once; an error has no number of a row on a cluster."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        text = [row.get(name) or "" for name in ("id", "prompt", "answer", "score", "padding", "input_answer")]
        return (*map(str, text), str(bool(row["error"])))

    assert len(found) == len(expected)
    assert sorted(map(key, found)) == sorted(map(key, expected))


Expected = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def expected(tiny_llama_package: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """`expected(suffix)`: what `run` answers without a cluster to a file of that kind (CSV has no null)."""

    @cache
    def answer(given: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("expected")
        source = write(folder / f"in.{given}", make_records(COUNT, padding=3000))
        args = arguments(tiny_llama_package, tasks, source, folder / "out.parquet", "--on-error", "record")
        assert CliRunner().invoke(main, args).exit_code == 0
        return read(folder / "out.parquet")

    return answer


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("given", "made"), [("csv", "parquet"), ("parquet", "jsonl"), ("jsonl", "csv")])
def test_the_answers_are_those_of_a_run_without_a_cluster(
    tiny_llama_package: Path,
    tasks: Path,
    tmp_path: Path,
    start: Any,
    expected: Expected,
    given: str,
    made: str,
) -> None:
    records = make_records(COUNT, padding=3000)
    (tmp_path / "in").mkdir()
    for index in range(2):
        write(tmp_path / "in" / f"{index}.{given}", records[index::2])
    out = tmp_path / f"out.{made}"
    told = finish(start(arguments(tiny_llama_package, tasks, tmp_path / "in", out, "--engine", "ray")))
    assert "answers failed and were recorded" in told
    found = parts(out)
    if made == "jsonl":  # the whole result, as without a cluster
        assert sorted(row["id"] for row in found) == sorted(record["id"] for record in records)
        labels = {row["id"]: row["label"] for row in found if "label" in row}
        assert labels == {row["id"]: row["answer"] for row in expected(given) if row["score"]}
    else:
        same(found, expected(given))
    assert not (tmp_path / f"out.{made}.part").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_small_input_is_shared_among_the_actors(
    tiny_llama_package: Path, tasks: Path, tmp_path: Path, start: Any, kind: str
) -> None:
    source = write(tmp_path / f"in.{kind}", make_records(COUNT))
    out = tmp_path / "out"
    finish(start(arguments(tiny_llama_package, tasks, source, out, "--engine", "ray", "--actors", 2)))
    assert len([*out.iterdir()]) >= 3  # what an actor got at once is a file
    assert len(parts(out)) == COUNT


def wait_for_parts(part: Path, process: subprocess.Popen[str], count: int = 2) -> list[Path]:
    """Files whose rows are noted as written."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        done = [path for path in (part / "ids").glob("*.parquet") if not path.name.endswith(".pending.parquet")]
        if len(done) >= count:
            return done
        time.sleep(0.05)
    raise AssertionError("nothing was written")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("made", ["parquet", "jsonl"])
def test_a_driver_that_is_killed_goes_on_without_a_row_lost_or_doubled(
    tiny_llama_package: Path, tasks: Path, tmp_path: Path, start: Any, expected: Expected, made: str
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_records(COUNT, padding=3000)), tmp_path / f"out.{made}"
    args = arguments(tiny_llama_package, tasks, source, out, "--engine", "ray", "--resume", "--actors", 1)
    process = start(args)
    done = wait_for_parts(tmp_path / f"out.{made}.part", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = sum(pyarrow.parquet.read_metadata(path).num_rows for path in done)
    assert 0 < before < COUNT
    other = write(tmp_path / "other.jsonl", make_records(3))
    wrong = [str(other) if one == str(source) else one for one in args]
    assert "was begun with another input" in refused(*wrong)
    finish(start(args))
    found = parts(out)
    if made == "parquet":
        same(found, expected("jsonl"))
    else:
        assert sorted(row["id"] for row in found) == sorted(row["id"] for row in expected("jsonl"))
    names = {path.stem for path in out.iterdir()}
    assert {path.stem for path in done} <= names, "what was written before is not written again"
    assert not (tmp_path / f"out.{made}.part").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_that_is_killed_is_replaced(
    tiny_llama_package: Path, tasks: Path, tmp_path: Path, start: Any, expected: Expected
) -> None:
    source, out = write(tmp_path / "in.jsonl", make_records(COUNT, padding=3000)), tmp_path / "out.parquet"
    process = start(arguments(tiny_llama_package, tasks, source, out, "--engine", "ray", "--resume", "--actors", 1))
    wait_for_parts(tmp_path / "out.parquet.part", process, 1)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "MapWorker" in " ".join(child.cmdline())
    ]
    assert workers
    for worker in workers:
        worker.kill()
    finish(process)
    same(parts(out), expected("jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_ends_it_and_leaves_nothing(tiny_llama_package: Path, tasks: Path, tmp_path: Path, start: Any) -> None:
    source, out = write(tmp_path / "in.jsonl", make_records(COUNT * 5, padding=3000)), tmp_path / "out.parquet"
    process = start(arguments(tiny_llama_package, tasks, source, out, "--engine", "ray"))
    end = time.monotonic() + 200
    while not [*(tmp_path / "out.parquet.part").glob("data/*.parquet")] and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "error: stopped by SIGTERM" in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["in.jsonl"]
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ids_that_are_not_all_different_end_a_run_that_could_be_wrong(
    tiny_llama_package: Path, tasks: Path, tmp_path: Path, start: Any
) -> None:
    records = [{**record, "id": "same" if i in (3, 5) else record["id"]} for i, record in enumerate(make_records(20))]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    more = ("--engine", "ray", "--resume", "--id-column", "id")
    process = start(arguments(tiny_llama_package, tasks, source, out, *more))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "column 'id' has 1 rows more than once" in err.splitlines()[-1]
    assert not out.exists()
    assert json.loads((tmp_path / "out.jsonl.part" / "run.json").read_bytes())["id_column"] == "id"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_ends_a_run_is_one_line(tiny_llama_package: Path, tasks: Path, tmp_path: Path, start: Any) -> None:
    source, out = write(tmp_path / "in.jsonl", make_records(20)), tmp_path / "out.jsonl"
    process = start(arguments(tiny_llama_package, tasks, source, out, "--engine", "ray", "--on-error", "stop"))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "no prompt 'nothing'" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert " ERROR " not in err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
