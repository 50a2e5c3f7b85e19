"""One real run over a tiny package, looked at from all sides."""

import csv
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import edgeprompt
from edgeprompt.bench import BenchOptions, Report, compare, load_report, run_bench
from edgeprompt.bench.latency import WORKER_ROWS
from edgeprompt.bench.page import to_html
from edgeprompt.bench.report import DEFINITIONS, to_csv, to_json, to_jsonl, to_md
from edgeprompt.bench.workload import synthetic_prompt, text_of
from edgeprompt.cli import main
from edgeprompt.errors import InputError
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_prompt

OPTIONS = BenchOptions(
    input_tokens=(8, 24), new_tokens=6, batch=(1, 3), tasks=(1, 5), threads=(1,), providers=("cpu",), repetitions=4
)
NS = {
    "cold_start",
    "warm_load",
    "add_prompt",
    "swap",
    "ttft_cached",
    "ttft_rerun",
    "ttft_none",
    "ttft_hard",
    "tpot",
    "itl",
    "tasks_reused",
    "tasks_computed",
}
BYTES = {"peak_rss", "peak_rss_anonymous", "peak_rss_file", "prompt_disk", "prompt_resident"}
MAY_BE_NOTHING = ("swap", "prompt_resident", "drafted_tokens", "accepted_tokens")
DRAFTS = ("decode_drafts", "drafted_tokens", "accepted_tokens")
DECODER_TESTS = NS | BYTES | {"decode", "prefill", "classify", "energy", *DRAFTS}


@pytest.fixture(scope="module")
def prompt_file(tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "tone.safetensors"
    edgeprompt.save_prompt(synthetic_prompt(open_package(tiny_llama_package), name="tone", seed=3), file)
    return file


@pytest.fixture(scope="module")
def report(tiny_llama_package: Path, prompt_file: Path) -> Report:
    return run_bench(tiny_llama_package, dataclasses.replace(OPTIONS, prompts=(prompt_file,)))


def of(report: Report, test: str) -> list[Any]:
    return [result for result in report.results if result.test == test]


def test_measures_everything_that_the_design_names(report: Report):
    found = {result.test for result in report.results}
    if sys.platform != "linux":
        found |= BYTES
    assert found == DECODER_TESTS
    assert found <= set(DEFINITIONS)
    for result in report.results:
        assert (result.unit == "ns") == (result.test in NS)
        assert (result.unit == "bytes") == (result.test in BYTES)
        assert all(sample > 0 for sample in result.samples) or result.test in MAY_BE_NOTHING, result


def test_lanes_where_there_are_several_threads(tiny_llama_package: Path, prompt_file: Path):
    options = dataclasses.replace(OPTIONS, prompts=(prompt_file,), threads=(2,), repetitions=1, tasks=(1,), batch=(1,))
    report = run_bench(tiny_llama_package, options)
    (workers,) = of(report, "classify_workers")
    assert (workers.batch_size, workers.n_threads, workers.unit) == (2 * WORKER_ROWS, 2, "examples/s")
    assert "classify_workers" in DEFINITIONS


def test_sweeps_and_sample_counts(report: Report):
    assert [result.n_prompt for result in of(report, "ttft_cached")] == [8, 24]
    assert [result.batch_size for result in of(report, "decode")] == [1, 3]
    assert [result.n_tasks for result in of(report, "peak_rss")] == [1, 5]
    for test in ("cold_start", "warm_load", "add_prompt", "swap", "ttft_cached", "ttft_rerun", "prefill", "decode"):
        assert all(len(result.samples) == 4 for result in of(report, test)), test
    assert len(of(report, "itl")[0].samples) <= 4 * (6 - 1)
    assert [len(result.samples) for result in of(report, "tpot")] == [4, 4 * 3]


def test_depth_tells_what_stands_in_the_cache(report: Report):
    assert {result.n_depth for result in of(report, "ttft_cached")} == {16}
    assert {result.n_depth for test in ("ttft_rerun", "ttft_none", "ttft_hard") for result in of(report, test)} == {0}
    assert of(report, "ttft_hard")[0].n_prompt > 8


@pytest.mark.parametrize(
    ("method", "template", "depth"),
    [
        ("prompt-tuning", "{text}{prompt}\nA:", 0),
        ("prompt-tuning", "{prompt}{text}\nA:", 8),
        ("prefix-tuning", "{text}{prompt}\nA:", 0),
        ("prefix-tuning", "{text}\nA:", 8),
    ],
)
def test_a_prompt_behind_the_text_has_no_depth(
    method: str, template: str, depth: int, tiny_llama_package: Path, tmp_path: Path
):
    manifest, where = open_package(tiny_llama_package).manifest, Template.parse(template)
    infix = method == "prefix-tuning" and not depth
    prompt = make_prompt(manifest, "placed", method, count=8, template=where, is_infix=infix)
    edgeprompt.save_prompt(prompt, file := tmp_path / "placed.safetensors")
    small = BenchOptions((file,), (4,), 2, (1,), (1,), (1,), ("cpu",), 1, 0)
    (first,) = of(run_bench(tiny_llama_package, small), "ttft_cached")
    assert first.n_depth == depth


def test_cold_start_contains_a_load(report: Report):
    assert of(report, "cold_start")[0].summary.min > of(report, "warm_load")[0].summary.min


def test_output_hash_is_of_the_tokens_generated(report: Report, tiny_llama_package: Path, prompt_file: Path):
    text = text_of(open_package(tiny_llama_package).tokenizer, 8)
    with edgeprompt.load(tiny_llama_package, threads=1, prompts=[prompt_file]) as runtime:
        ids = runtime.generate(text, prompt="tone", max_new_tokens=6, temperature=0).token_ids
    assert len(ids) == 6
    assert of(report, "decode")[0].output_hash == hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest()


def test_package_and_device_are_named(report: Report, tiny_llama_package: Path):
    assert report.package["hash"] == open_package(tiny_llama_package).manifest.weights_hash
    assert report.device["edgeprompt"] == edgeprompt.__version__
    assert set(report.throttling) == {"before", "after", "slowdown", "seen"}


def test_without_a_prompt_a_random_one_is_measured(tiny_llama_package: Path):
    small = BenchOptions((), (4,), 2, (1,), (1,), (1,), ("cpu",), 1, 0)
    found = run_bench(tiny_llama_package, small)
    assert found.settings["prompts"] == ["synthetic"]
    assert len(of(found, "ttft_cached")[0].samples) == 1


@pytest.mark.parametrize("rows", [True, False])
def test_a_prompt_with_a_trained_head(rows: bool, tiny_llama_package: Path, tmp_path: Path):
    prompt = synthetic_prompt(open_package(tiny_llama_package), name="head")
    weight = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    prompt = dataclasses.replace(
        prompt,
        method=prompt.method if rows else "head",
        prompt_embeddings=prompt.prompt_embeddings if rows else None,
        template=prompt.template if rows else prompt.template.without_prompt(),
        verbalizer={},
        labels=("a", "b"),
        head={"score.weight": weight},
        head_spec=Head("last", (HeadStep("linear", "score"),)),
    )
    file = tmp_path / "head.safetensors"
    edgeprompt.save_prompt(prompt, file)
    options = dataclasses.replace(OPTIONS, prompts=(file,), input_tokens=(8,), repetitions=1, tasks=(1,), batch=(1,))
    found = {result.test: result for result in run_bench(tiny_llama_package, options).results}
    assert {"ttft_cached", "ttft_hard", "classify"} <= set(found)


def test_json_round_trip(report: Report, tmp_path: Path):
    file = tmp_path / "new.json"
    file.write_text(to_json(report), encoding="utf-8")
    assert load_report(file).results == report.results


def test_rows_have_llama_bench_names(report: Report):
    rows = [json.loads(line) for line in to_jsonl(report).splitlines()]
    assert len(rows) == len(report.results)
    for row in rows:
        assert {"n_prompt", "n_gen", "n_depth", "n_threads", "avg_ns", "stddev_ns", "avg_ts", "samples_ns"} <= set(row)
        assert row["avg_ns"] == (pytest.approx(np.mean(row["samples"])) if row["unit"] == "ns" else None)
    (decode, _) = (row for row in rows if row["test"] == "decode")
    assert decode["avg_ts"] == pytest.approx(np.mean(decode["samples_ts"]))


def test_time_to_first_token_has_ort_genai_names(report: Report):
    (row, *_) = (row for row in json.loads(to_json(report))["results"] if row["test"] == "ttft_cached")
    assert row["ort_genai"]["Prompt Processing Latency (ms)"] == pytest.approx(row["avg_ns"] / 1e6)


def test_csv_holds_every_result(report: Report):
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert [row["test"] for row in rows] == [result.test for result in report.results]
    assert json.loads(rows[0]["samples"]) == list(report.results[0].samples)


def test_markdown_has_a_line_per_result_and_its_definitions(report: Report):
    text = to_md(report)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(tables) == len(report.results) + 2  # head and rule
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "tokenisation and sampling included" in text
    assert all(f"`{test}`" in text for test in DECODER_TESTS if of(report, test))


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [
            value for key, value in attrs if key in ("src", "href") and value and re.match(r"\w+:|//", value)
        ]


def test_html_is_self_contained_with_plots(report: Report):
    odd = dataclasses.replace(report, package={**report.package, "model": "<script>alert(1)</script>"})
    page = to_html(odd)
    parser = _Links()
    parser.feed(page)
    assert parser.tags.count("figure") == 4
    assert "blocks of" not in page
    assert 'viewBox="0 0' in page
    assert parser.outside == []
    assert "script" not in parser.tags
    assert "url(http" not in page
    assert page.count("<svg") == 4
    assert all(label in page for label in ("prompts loaded", "tokens of the text", "in one call", "milliseconds"))


def test_the_title_tells_how_weights_are_stored(report: Report):
    blocks = dataclasses.replace(report, package={**report.package, "precision": "int4", "block_size": 128})
    assert to_md(blocks).splitlines()[0].endswith(" (int4, blocks of 128)")
    assert "int4, blocks of 128: edgeprompt bench" in to_html(blocks)


def _shifted(report: Report, factor: float, **changes: Any) -> Report:
    results = [
        dataclasses.replace(result, samples=tuple(sample * factor for sample in result.samples), **changes)
        for result in report.results
    ]
    return dataclasses.replace(report, results=tuple(results))


def _verdicts(text: str, test: str) -> set[str]:
    return {line.split("|")[-2].strip() for line in text.splitlines() if line.startswith(f"| {test} |")}


def test_compare_says_what_is_beyond_noise(report: Report):
    assert _verdicts(compare(_shifted(report, 20), report), "warm_load") == {"worse"}
    assert _verdicts(compare(_shifted(report, 20), report), "decode") == {"better"}
    assert _verdicts(compare(report, report), "warm_load") == {"same within noise"}
    assert _verdicts(compare(report, report), "prompt_disk") == {"too few samples"}
    (line,) = (line for line in compare(_shifted(report, 2), report).splitlines() if line.startswith("| warm_load |"))
    assert "| 2.000 |" in line


def test_compare_warns_about_other_tokens_device_and_missing_results(report: Report):
    other = _shifted(report, 1, output_hash="0")
    text = compare(dataclasses.replace(other, device={**other.device, "cpu": "another"}), report)
    assert "generated tokens differ" in text
    assert "another device" in text
    assert "in one of the two only" not in text
    fewer = dataclasses.replace(report, results=report.results[1:])
    assert "1 results are in one of the two only" in compare(fewer, report)


def _bench(*args: Any) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


SMALL = ("--input-tokens", "4", "--new-tokens", "2", "--batch", "1", "--tasks", "1", "--threads", "1",
         "--repetitions", "1", "--warmup", "0", "--provider", "cpu")  # fmt: skip


def test_command_writes_a_file_and_compares(tiny_llama_package: Path, report: Report, tmp_path: Path):
    old = tmp_path / "old.json"
    old.write_text(to_json(report), encoding="utf-8")
    out = tmp_path / "new.json"
    result = _bench(tiny_llama_package, *SMALL, "--format", "json", "-o", out, "--compare", old)
    assert result.exit_code == 0, result.output
    assert load_report(out).settings["repetitions"] == 1
    assert result.stdout.startswith("## Compared with")


@pytest.mark.parametrize("value", ["0", "a", "1,,2", "-3", ""])
def test_bad_lists_are_wrong_usage(tiny_llama_package: Path, value: str):
    result = _bench(tiny_llama_package, "--batch", value)
    assert result.exit_code == 2
    assert "1,4,16" in result.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--provider", "npu"), "'npu' is not available"),
        (("--input-tokens", "300"), "exceed the 256 positions"),
        (("--compare", "{bad}"), "no result of edgeprompt bench"),
    ],
)
def test_refused_in_one_line(tiny_llama_package: Path, tmp_path: Path, more: tuple[str, ...], said: str):
    bad = tmp_path / "bad.json"
    bad.write_text("{}", encoding="utf-8")
    result = _bench(tiny_llama_package, *SMALL, *(part.format(bad=bad) for part in more))
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert said in line


@pytest.mark.parametrize("change", [{"batch": (0,)}, {"tasks": ()}, {"new_tokens": 1}, {"repetitions": 0}])
def test_library_refuses_bad_numbers(tiny_llama_package: Path, change: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(change))):
        run_bench(tiny_llama_package, dataclasses.replace(OPTIONS, **change))


def test_needs_the_runtime_install_only():
    code = (
        "import sys, edgeprompt.bench, edgeprompt.bench.worker, edgeprompt.cli.bench\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'exporters', 'matplotlib', 'scipy', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
