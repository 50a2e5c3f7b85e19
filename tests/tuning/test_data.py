"""Training reads data as evaluation and `run` do, and refuses what they refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt.errors import DataError, EdgePromptError
from edgeprompt.evaluation.evaluate import Columns
from edgeprompt.tuning import TuneOptions, tune
from edgeprompt.tuning.plan import inspect_data

SHORT = TuneOptions(num_virtual_tokens=2, steps=1, batch_size=4, max_length=64)
FEW = [{"text": "a cat", "label": "animal"}, {"text": "one two", "label": "number"}] * 4


def tuned(base: Path, rows: Any, out: Path, **changes: Any) -> Any:
    return tune(base, rows, output=out / "p.safetensors", options=dataclasses.replace(SHORT, **changes), progress=False)


@pytest.fixture
def bases(tiny_llama_base: Path, encoder_base: Callable[[str], Path], seq2seq_base: Callable[[str], Path]) -> Any:
    return {"decoder": tiny_llama_base, "encoder": encoder_base("BERT"), "encoder-decoder": seq2seq_base("T5")}


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": float("nan")}, "row 9 .*nothing in column 'label'"),
        ({"label": [1, 0, 1]}, "row 9 .*holds a list"),
        ({"label": "['animal', 'number']"}, "row 9 .*list written as text"),
        ({"label": "1,0,1"}, "row 9 .*a 0 or 1 for each label"),
        ({"label": "0 1 0"}, "row 9 .*a 0 or 1 for each label"),
        ({"label": "0.75"}, "row 9 .*number with a fraction"),
        ({"label": 1}, "row 9 .*label 1 is a number, and an earlier row has the name 'animal'"),
        ({"text": None}, "row 9 .*nothing in column 'text'"),
        ({"text": "a\0b"}, "row 9 .*holds NUL"),
    ],
    ids=["nan", "multi-hot", "list as text", "flags", "flags apart", "fraction", "a number", "null", "nul"],
)
def test_a_bad_row_is_named(bases: Any, kind: str, wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        tuned(bases[kind], [*FEW, {**FEW[0], **wrong}], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("one", "other"),
    [("new york", "new\u00a0york"), ("café", "cafe\u0301"), ("1", "1.0"), ("ok", "ok\u200b"), ("true", "True")],
)
def test_labels_that_look_the_same_are_not_two_classes(bases: Any, one: str, other: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 10 of 'rows': label .* stands for what an earlier row calls"):
        tuned(bases["decoder"], [*FEW, {"text": "x", "label": one}, {"text": "x", "label": other}], tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True, 1, False, 0], "row 2 .*label 1 is a number, and an earlier row has the truth value True"),
        ([True, "positive"], "row 2 .*label 'positive' is a name, and an earlier row has the truth value True"),
        ([["war"], "war, art"], "row 2 .*label 'war, art' is a name, and an earlier row has the list .*as lists"),
        (["Good", "bad", "good"], "row 3 .*'good' differs from 'Good' of an earlier row in case alone"),
        (["b'good'", "b'bad'"], "row 1 .*a value as Python prints it"),
        (["np.str_('good')", "bad"], "row 1 .*a value as Python prints it"),
        (["ok \u2764", "ok \u2764\ufe0f"], "row 2 .*stands for what an earlier row calls"),
        (["-0", "0"], "row 2 .*stands for what an earlier row calls"),
        ([10**5000, 1], "row 1 .*too many digits"),
    ],
)
def test_labels_whose_meaning_is_not_certain_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        inspect_data([{"text": "a", "label": label} for label in labels], TuneOptions())


def test_labels_that_differ_are_classes_of_their_own() -> None:
    for labels in ([2**53, 2**53 + 1], ["true", "false", "mixed"], [True, "true "[:4].title(), False]):
        found = inspect_data([{"text": "a", "label": label} for label in labels], TuneOptions())
        assert set(found.labels) == {str(label) for label in labels}
    rows = [{"text": "a", "label": label} for label in ("US", "us")]
    assert inspect_data(rows, TuneOptions(problem_type="single_label")).labels == ("US", "us")
    for text in ("war;art", "war|art"):
        with pytest.raises(DataError, match=r"row 1 .*reads like several labels"):
            inspect_data([{"text": "a", "label": text}], TuneOptions(problem_type="multi_label"))


def test_numbers_with_fractions_are_classes_where_that_is_said(bases: Any, tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": str(0.5 + number % 2)} for number in range(8)]
    result = tuned(bases["encoder"], rows, tmp_path, problem_type="single_label")
    assert result.prompt.labels == ("0.5", "1.5")


@pytest.mark.parametrize("column", ["text", "target"])
def test_an_infinite_number_is_no_text(bases: Any, column: str, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "target": "x", **({column: float("inf")} if number == 4 else {})} for number in range(8)]
    with pytest.raises(DataError, match=f"row 5 of .*'{column}' holds inf, which is no text"):
        tuned(bases["decoder"], rows, tmp_path)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_target_that_is_nothing_is_refused(bases: Any, kind: str, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "target": "nan" if number == 4 else "x"} for number in range(8)]
    with pytest.raises(DataError, match=r"row 5 of .*'target' holds 'nan'"):
        tuned(bases[kind], rows, tmp_path)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("empty", ["", " \t "])
def test_an_empty_target_is_refused(bases: Any, kind: str, suffix: str, empty: str, tmp_path: Path) -> None:
    """It was learned: answer nothing."""
    rows = [{"text": "a cat", "target": empty if number == 4 else "x"} for number in range(8)]
    data = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        data.write_text("text,target\n" + "".join(f"{row['text']},{row['target']}\n" for row in rows))
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"row 5 of .* has nothing in column 'target'"):
        tuned(bases[kind], data, tmp_path)
    assert list(tmp_path.iterdir()) == [data]


def test_multi_hot_labels_are_refused_and_named_ones_are_classes(bases: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 of 'rows': column 'label' holds .*write the names of the labels"):
        tuned(bases["encoder"], [{"text": "a", "label": [1, 0, 1]}] * 4, tmp_path)
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["war", "drama", "art"]))}
    )
    rows = [{"text": "a", "label": [0, 2]}, {"text": "b", "label": [1]}] * 4
    prompt = tuned(bases["encoder"], datasets.Dataset.from_list(rows, features=features), tmp_path).prompt
    assert prompt.labels == ("art", "drama", "war")


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_white_space_and_fractions_make_no_class_of_their_own(bases: Any, kind: str, tmp_path: Path) -> None:
    names = [{"text": "a cat", "label": "animal "}, *FEW] * 2
    numbers = [{"text": "x", "label": 1}, {"text": "y", "label": 1.0}, {"text": "z", "label": " 2"}] * 3
    for rows, labels in ((names, ("animal", "number")), (numbers, ("1", "2"))):
        result = tuned(bases[kind], rows, tmp_path)
        assert result.prompt.labels == labels
        for number, row in enumerate(rows, 1):
            assert Columns().references(result.prompt, row, number)[0] in labels


def test_ids_of_tags_become_their_names(bases: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": names})
    rows = [{"tokens": ["Anna", "met"], "ner_tags": [1, 0]}] * 8
    prompt = tuned(bases["encoder"], datasets.Dataset.from_list(rows, features=features), tmp_path).prompt
    assert (prompt.task, prompt.labels) == ("tag", ("B-PER", "O"))
    with pytest.raises(DataError, match="row 1 of 'rows': column 'ner_tags' holds 1, an id without a name"):
        tuned(bases["encoder"], rows, tmp_path)


def test_numbers_that_are_none_are_refused_with_the_row(bases: Any, tmp_path: Path) -> None:
    for wrong in (float("nan"), float("inf"), "nan", 1e300, 10**400, "1_000"):
        rows = [{"text": "a", "label": 1.5}] * 5 + [{"text": "b", "label": wrong}]
        with pytest.raises(DataError, match="row 6 of 'rows'"):
            tuned(bases["encoder"], rows, tmp_path, problem_type="regression")


def test_a_mask_in_the_text_is_refused_by_training_as_by_run(
    encoder_base: Callable[[str], Path], encoder_package: Callable[..., Path], tmp_path: Path
) -> None:
    words = {"animal": ("a",), "number": ("n",)}
    cloze = {"template": "{prompt}{text} is {mask}", "verbalizer": words}
    rows = [*FEW, {"text": "a <mask> cat", "label": "animal"}]
    with pytest.raises(DataError, match="row 9 of 'rows' holds '<mask>'"):
        tuned(encoder_base("BERT"), rows, tmp_path, **cloze)
    result = tuned(encoder_base("BERT"), FEW, tmp_path, **cloze)
    with edgeprompt.load(encoder_package("BERT")) as runtime:
        name = runtime.add_prompt(result.path)
        with pytest.raises(EdgePromptError, match="mask"):
            runtime.classify("a <mask> cat", prompt=name)
    # With a head the mask stands for nothing, and both take it.
    assert tuned(encoder_base("BERT"), rows, tmp_path).prompt.labels == ("animal", "number")


def test_the_only_row_of_a_class_stays_in_training(bases: Any, tmp_path: Path) -> None:
    rows = [*FEW, *FEW, {"text": "red", "label": "colour"}]
    result = tuned(bases["decoder"], rows, tmp_path, eval_split=0.5)
    assert result.notes == ("1 classes have one example each, which stays in training: evaluation has none of them",)
    assert result.prompt.training["examples"] + result.prompt.training["eval_examples"] == 17


def test_texts_are_the_same_whatever_wrote_the_lines(bases: Any, tmp_path: Path) -> None:
    texts = ["one\ntwo", "a cat", "three four", "cow"]
    plain = "".join(json.dumps({"text": t, "label": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts))
    made = []
    for name, data in {
        "unix": plain.encode(),
        "windows": plain.replace("\\n", "\\r\\n").replace("\n", "\r\n").encode("utf-8-sig"),
        "utf16": plain.encode("utf-16"),
        "marks": plain.replace('"text": "', '"text": "\\ufeff').encode(),
    }.items():
        (tmp_path / f"{name}.jsonl").write_bytes(data)
        result = tuned(bases["decoder"], tmp_path / f"{name}.jsonl", tmp_path, name="p", eval_split=0.0)
        made.append(result.prompt.prompt_embeddings.tobytes())
    assert len(set(made)) == 1
