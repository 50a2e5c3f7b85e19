"""The class that actors run, without a cluster: real runtimes, Arrow tables in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest

import edgeprompt
from edgeprompt import EngineOptions, Request
from edgeprompt.errors import DataError, EdgePromptError, InputError, PromptNotFoundError
from edgeprompt.ray.answers import LEAST_PREFIX_BUDGET, Answers, cpus_of, pool, prefix_budget, root_cause
from edgeprompt.request import GenerationOptions
from tests.ray.conftest import make_records
from tests.support.runtimes import QUIET

FEW = GenerationOptions(max_new_tokens=3)


@pytest.fixture(scope="module")
def keywords(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    engine = EngineOptions(provider="cpu", threads=1, cache_folder=tmp_path_factory.mktemp("cache"))
    return {"folders": [tasks], "prompt_column": "task", "options": FEW, "engine": engine}


def test_a_mixed_batch_has_the_runtimes_answers_and_keeps_its_columns(
    tiny_llama_package: Path, tasks: Path, keywords: dict[str, Any]
) -> None:
    records = make_records(120)
    table = Answers(tiny_llama_package, **keywords)(pyarrow.Table.from_pylist(records))
    found = table.to_pylist()
    assert [row["id"] for row in found] == [record["id"] for record in records]
    assert {row["input_answer"] for row in found} == {"gold"}
    assert all(table.schema.field(name).type == pyarrow.string() for name in ("prompt", "answer", "score", "error"))
    bad = {i for i, record in enumerate(records) if record["text"] is None or record["task"] == "nothing"}
    assert {i for i, row in enumerate(found) if row["error"]} == bad
    assert found[40]["error"].startswith("no prompt 'nothing'; there are: task")
    assert "has nothing in column 'text'" in found[50]["error"]
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        runtime.add_folder(tasks)
        for index in sorted(set(range(20)) - bad):
            record = records[index]
            (one,) = runtime.run([Request(record["text"].replace("\r", "\n"), record["task"], options=FEW)])
            expected = one.label if record["task"][-1] in "1357" else one.text  # type: ignore[union-attr]
            assert (found[index]["prompt"], found[index]["answer"]) == (record["task"], expected)


def test_errors_are_recorded_or_left_out_or_end_the_job(tiny_llama_package: Path, keywords: dict[str, Any]) -> None:
    table = pyarrow.Table.from_pylist(make_records(60))
    kept = Answers(tiny_llama_package, on_error="skip", **keywords)(table)
    assert len(kept) == 60 - 3
    assert "error" not in kept.column_names
    with pytest.raises(EdgePromptError, match="no prompt 'nothing'"):
        Answers(tiny_llama_package, on_error="stop", **keywords)(table)


def test_each_record_with_each_prompt(tiny_llama_package: Path, tasks: Path, keywords: dict[str, Any]) -> None:
    prompts = [tasks / "task1.safetensors", tasks / "task3.safetensors"]
    answers = Answers(tiny_llama_package, prompts=prompts, engine=keywords["engine"], on_error="skip")
    table = answers(pyarrow.table({"text": ["a film", "a story"], "n": [1, 2]}))
    assert table.column("n").to_pylist() == [1, 1, 2, 2]
    assert table.column("prompt").to_pylist() == ["task1", "task3"] * 2
    empty = answers(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))
    assert (len(empty), empty.column_names) == (0, ["text", "prompt", "answer", "score"])


def test_the_packed_graph_is_made_once_and_mapped(tiny_llama_package: Path, tmp_path: Path) -> None:
    engine = EngineOptions(provider="cpu", cache_folder=tmp_path / "cache")
    answers = [Answers(tiny_llama_package, engine=engine) for _ in range(2)]
    (entry,) = (tmp_path / "cache").glob("graph-*")
    assert Path("/proc/self/maps").read_text().count(str(entry / "graph.onnx.data")) >= len(answers)


def test_actors_share_an_eighth_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprompt.ort.free_memory.free_memory", lambda: 64 << 30)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [prefix_budget(cpus) for cpus in (1, 2, 8)] == [1 << 30, 2 << 30, 8 << 30]
    monkeypatch.setattr("edgeprompt.ort.free_memory.free_memory", lambda: None)
    assert prefix_budget(1) == LEAST_PREFIX_BUDGET


def test_what_cannot_be_is_said(tiny_llama_package: Path, tasks: Path) -> None:
    with pytest.raises(InputError, match="on_error is 'never'"):
        Answers(tiny_llama_package, on_error="never")
    with pytest.raises(InputError, match="needs prompt_column"):
        Answers(tiny_llama_package, folders=[tasks])
    for wrong in (0, (0, 2), (3, 2)):
        with pytest.raises(InputError, match="actors is"):
            pool(wrong)
    assert (pool(None), pool(3), pool((1, None))) == ({"min_size": 1}, {"min_size": 3, "max_size": 3}, {"min_size": 1})
    assert [cpus_of(EngineOptions(**given)) for given in ({}, {"threads": 2}, {"workers": 3})] == [1, 2, 3]


def test_the_cause_is_found_among_the_errors_around_it() -> None:
    def fail() -> None:
        try:
            try:
                raise DataError("this row has no column")
            except DataError as error:
                raise KeyError("inner") from error
        except KeyError as error:
            raise RuntimeError("outer") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert str(root_cause(caught.value)) == "this row has no column"
    assert root_cause(ValueError("no cause")) is None
    # As Ray tells of an actor's error.
    text = "ray::MapWorker.submit()\nedgeprompt.errors.PromptNotFoundError: no prompt ''; there are: a\n\nThe above"
    told = root_cause(RuntimeError(f"{text} exception was the direct cause ...\nTo change retry attempts, ..."))
    assert isinstance(told, PromptNotFoundError)
    assert str(told) == "no prompt ''; there are: a"
    assert root_cause(RuntimeError("edgeprompt.errors.Nothing: a")) is None


def test_a_column_that_the_data_has_not_ends_the_job(tiny_llama_package: Path, keywords: dict[str, Any]) -> None:
    table = pyarrow.Table.from_pylist(make_records(3))
    with pytest.raises(DataError, match="the data has no column 'tsak'"):
        Answers(tiny_llama_package, **{**keywords, "prompt_column": "tsak"})(table)
    with pytest.raises(DataError, match="the data has no column 'txet'"):
        Answers(tiny_llama_package, **{**keywords, "folders": [], "prompt_column": None, "text_column": "txet"})(table)


def test_columns_of_views_and_dictionaries(tiny_llama_package: Path, keywords: dict[str, Any]) -> None:
    """Arrow cannot take rows of views: the batch ended in a traceback."""
    plain = pyarrow.table({"id": [*"abc"], "text": ["a film", None, "ä story"], "task": ["task1"] * 3})
    answers = Answers(tiny_llama_package, **{**keywords, "on_error": "skip"})
    for kind in (pyarrow.string_view(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        found = answers(plain.cast(pyarrow.schema([(name, kind) for name in plain.column_names])))
        assert found.to_pylist() == answers(plain).to_pylist(), kind
    view, binary = pyarrow.string_view(), pyarrow.array([b"\xff", b"", None], pyarrow.binary_view())
    nested = {
        "list": pyarrow.array([["x"], [], None], pyarrow.list_(view)),
        "large": pyarrow.array([["x"], [], None], pyarrow.large_list(view)),
        "fixed": pyarrow.array([["x"], ["y"], None], pyarrow.list_(view, 1)),
        "struct": pyarrow.array([{"q": "x"}, {"q": None}, None], pyarrow.struct([("q", view)])),
        "map": pyarrow.array([[("k", "v")], [], None], pyarrow.map_(view, view)),
    }
    given = pyarrow.table({**nested, "binary": binary, "text": plain["text"], "task": plain["task"]})
    kept = answers(given)
    assert kept.drop_columns(["answer", "score", "prompt"]).to_pylist() == [given.to_pylist()[i] for i in (0, 2)]
