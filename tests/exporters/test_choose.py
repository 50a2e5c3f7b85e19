"""`--precision auto`: every candidate exported, measured and judged on this machine."""

import json
import os

import pytest
from click.testing import CliRunner

from edgeprompt import load, save_prompt
from edgeprompt.bench.workload import synthetic_prompt
from edgeprompt.cli import main
from edgeprompt.errors import DataError, InputError
from edgeprompt.package.folder import open_package
from exporters import export_best
from tests.support.prompts import make_prompt

WORDS = {"negative": (" bad",), "positive": (" good",)}
CANDIDATES = [("fp32", None), ("int8", None), ("int4", 32), ("int4", 128)]
TEXTS = [f"the {word} film number {number}" for number in range(6) for word in ("old", "new", "long", "short")]


@pytest.fixture(scope="module")
def prompt(tiny_llama_package, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "mood.safetensors"
    save_prompt(make_prompt(open_package(tiny_llama_package).manifest, "mood", verbalizer=WORDS), file)
    return file


@pytest.fixture(scope="module")
def data(tiny_llama_package, prompt, tmp_path_factory):
    """Rows whose label is what fp32 answers, so that its accuracy is 1 and the others' is their agreement."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with load(tiny_llama_package) as runtime:
        name = runtime.add_prompt(prompt)
        labels = [result.label for result in runtime.classify(TEXTS, prompt=name)]
    file.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(TEXTS, labels, strict=True)))
    return file


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in ("export", *args)], catch_exceptions=False)


def test_the_quickest_within_the_bound_is_kept(tiny_llama_base, prompt, data, tmp_path):
    out = tmp_path / "package"
    result = invoke(
        tiny_llama_base, "-o", out, "--precision", "auto", "--prompt", prompt, "--data", data, "--tolerance", "100"
    )
    assert result.exit_code == 0, result.stderr
    assert os.listdir(tmp_path) == ["package"]
    manifest = open_package(out).manifest
    open_package(out).verify()
    choice = manifest.extra["precision_choice"]
    assert [(line["precision"], line.get("block_size")) for line in choice["candidates"]] == CANDIDATES
    assert choice["rows"] == len(TEXTS)
    assert choice["device"]["cores"]
    (chosen,) = (line for line in choice["candidates"] if line["verdict"] == "chosen")
    assert chosen["precision"] == manifest.precision
    assert chosen.get("block_size") == manifest.extra.get("block_size")
    assert chosen["cost_ms"] == min(line["cost_ms"] for line in choice["candidates"])
    fp32 = choice["candidates"][0]["scores"]["mood"]
    assert fp32["value"] == 1
    assert fp32["points_below"] == 0
    assert result.stdout.split()[:2] == ["precision", "MB"]
    with load(out) as runtime:
        assert runtime.prompts == ("mood",)
        assert runtime.classify("good film", prompt="mood").label in WORDS


def test_calibration_texts_are_given_to_those_that_use_them(tiny_llama_base, prompt, data, tmp_path):
    texts = tmp_path / "calibration.txt"
    texts.write_text("Some words.\nMore words.\n", "utf-8")
    out = tmp_path / "package"
    given = ("--precision", "auto", "--prompt", prompt, "--data", data, "--tolerance", "100", "--calibration", texts)
    result = invoke(tiny_llama_base, "-o", out, *given)
    assert result.exit_code == 0, result.stderr
    choice = open_package(out).manifest.extra["precision_choice"]
    assert [line["precision"] for line in choice["candidates"]] == [precision for precision, _ in CANDIDATES]


def test_no_loss_is_no_choice_but_those_that_answer_as_fp32(tiny_llama_base, prompt, data, tmp_path):
    report = export_best(tiny_llama_base, tmp_path / "package", prompts=[prompt], data=data, tolerance=0)
    lines = report.manifest.extra["precision_choice"]["candidates"]
    for line in lines:
        lost = line["scores"]["mood"]["points_below"] > 0
        assert (line["verdict"] == "below the bound") == lost
    assert report.size_bytes == sum(file.stat().st_size for file in report.path.rglob("*") if file.is_file())


def test_generation_is_chosen_by_time_a_token(tiny_llama_base, tiny_llama_package, tmp_path):
    story = tmp_path / "story.safetensors"
    options = {"max_new_tokens": 4}
    save_prompt(make_prompt(open_package(tiny_llama_package).manifest, "story", generation=options), story)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "once upon", "target": "a time"}\n' * 3)
    result = invoke(
        tiny_llama_base, "-o", tmp_path / "p", "--precision", "auto", "--prompt", story, "--data", rows, "--json"
    )
    assert result.exit_code == 0, result.stderr
    choice = json.loads(result.stdout)["precision_choice"]
    assert choice["cost"] == "token"
    assert choice["candidates"][0]["scores"]["story"]["metric"] == "rouge"


def test_refusals_come_before_the_exports(tiny_llama_base, prompt, data, tmp_path):
    assert invoke(tiny_llama_base, "-o", tmp_path / "p", "--precision", "auto").exit_code == 2
    assert invoke(tiny_llama_base, "-o", tmp_path / "p", "--precision", "int8", "--block-size", "64").exit_code == 2
    assert invoke(tiny_llama_base, "-o", tmp_path / "p", "--precision", "auto", "--data", data).exit_code == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x", "label": "sad"}\n')
    with pytest.raises(DataError, match="'sad' is not a label"):
        export_best(tiny_llama_base, tmp_path / "p", prompts=[prompt], data=bad)
    with pytest.raises(InputError, match="at least one --prompt"):
        export_best(tiny_llama_base, tmp_path / "p", prompts=[], data=data)
    with pytest.raises(InputError, match="have their precision already"):
        export_best(tiny_llama_base, tmp_path / "p", prompts=[prompt], data=data, route="onnx")
    assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize("architecture", ["encoder", "seq2seq"])
def test_every_architecture(architecture, request, tmp_path):
    family = {"encoder": "BERT", "seq2seq": "T5"}[architecture]
    base = request.getfixturevalue(f"{architecture}_base")(family)
    package = open_package(request.getfixturevalue(f"{architecture}_package")(family))
    prompt, rows = tmp_path / "mood.safetensors", tmp_path / "rows.jsonl"
    save_prompt(synthetic_prompt(package), prompt)
    rows.write_text("".join(json.dumps({"text": text, "label": "positive"}) + "\n" for text in TEXTS))
    report = export_best(base, tmp_path / "package", prompts=[prompt], data=rows, tolerance=100)
    lines = report.manifest.extra["precision_choice"]["candidates"]
    assert [(line["precision"], line.get("block_size")) for line in lines] == CANDIDATES
    assert sum(line["verdict"] == "chosen" for line in lines) == 1
    assert report.manifest.prompts == ("prompts/mood.safetensors",)
