"""What a bench measured, as data and in the formats that other tools read."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprompt.bench.statistics import Summary, summarise
from edgeprompt.errors import InputError
from edgeprompt.package.files import read_regular

FORMAT = "edgeprompt-bench"
VERSION = 1

DEFINITIONS = {
    "cold_start": "Process start to first answer: interpreter, imports, load, prompt, one short text. Files are in the "
    "page cache.",
    "warm_load": "edgeprompt.load in a process that has loaded the package before.",
    "add_prompt": "Prompt file to ready: read, checked, its keys and values computed and resident.",
    "swap": "Extra time of a request that follows one of another task, both resident (pairwise difference, may be "
    "negative within noise).",
    "ttft_cached": "TTFT with the prompt's keys and values resident.",
    "ttft_rerun": "TTFT with the prompt run again in front of the text.",
    "ttft_prompt": "TTFT with the prompt (encoder-decoders run it beside the text).",
    "ttft_none": "TTFT of the bare base, no prompt.",
    "ttft_hard": "TTFT of the bare base with an instruction as text in place of the prompt.",
    "latency_prompt": "Text to label, tokenisation included (encoders).",
    "latency_none": "Text to embedding by the bare base, tokenisation included (encoders).",
    "latency_hard": "Text with an instruction in front to embedding by the bare base (encoders).",
    "tasks_reused": "Time to the first tokens of 8 tasks over one new text, by templates that begin with the text. The "
    "text is computed once.",
    "tasks_computed": "The same where no text is kept (reuse_texts=False): it is computed for each task.",
    "instruction_reused": "TTFT behind an instruction of 256 tokens of text, whose keys and values are resident.",
    "instruction_computed": "The same where no text is kept.",
    "chat_turn_2_reused": "TTFT of the second turn of a chat, 16 new tokens a turn. What was said before is resident.",
    "chat_turn_2_computed": "The same where no text is kept.",
    "chat_turn_10_reused": "TTFT of the tenth turn.",
    "chat_turn_10_computed": "The same where no text is kept.",
    "tpot": "(end-to-end - TTFT) / (new tokens - 1), per sequence of the batch; end tokens are ignored, greedy.",
    "itl": "Time between streamed pieces; a piece is a token, or several where one alone is no whole character.",
    "decode": "Tokens per second after the first, all sequences together.",
    "decode_drafts": "The same for one sequence whose tokens are drafted from its text and answer (--drafts). How much "
    "that gives depends on how much the answer repeats: here, what a random text makes the base say.",
    "drafted_tokens": "Tokens of such an answer that were drafted and checked.",
    "accepted_tokens": "Drafted tokens that became part of the answer: so many steps were saved.",
    "prefill": "Text tokens per second up to the first new token, no prompt, tokenisation excluded.",
    "classify": "Texts labelled per second, one call per batch, tokenisation included.",
    "embed": "Texts embedded per second, one call per batch, tokenisation included.",
    "classify_workers": "The same with `workers` instead of threads: texts side by side, each on one thread.",
    "embed_workers": "The same with `workers` instead of threads: batches side by side, each on one thread.",
    "peak_rss": "Largest resident set of a process that loads that many prompts and answers with the first and last.",
    "peak_rss_anonymous": "Largest anonymous part of the resident set (polled each 5 ms).",
    "peak_rss_file": "Largest file-backed part of the resident set (polled each 5 ms); other processes share it.",
    "prompt_disk": "Size of the prompt file.",
    "prompt_resident": "Growth of the anonymous resident set per further prompt, between the two smallest numbers of "
    "tasks.",
    "energy": "Joules per new token, whole device (RAPL, NVML); null where the device exposes no counter.",
}
EXCLUDED = (
    "TTFT is from text to first token id, tokenisation and sampling included. Excluded everywhere but in cold_start: "
    "process start, imports and load. Excluded everywhere: reading files that are not in the page cache."
)

HEAD = (
    "| test | prompt | provider | threads | batch | text | new | cached | tasks "
    "| n | min | p50 | mean ± stddev | p90 | p95 | p99 |"
)


@dataclass(frozen=True)
class Result:
    """Samples of one test under one setting. Units: ns, tokens/s, examples/s, bytes, J/token."""

    test: str
    unit: str
    samples: tuple[float, ...]
    prompt: str | None = None
    provider: str = "cpu"
    n_threads: int | None = None
    batch_size: int = 1
    n_prompt: int = 0
    """Tokens of the text."""
    n_gen: int = 0
    """New tokens."""
    n_depth: int = 0
    """Tokens that stand in the KV cache before the text."""
    n_tasks: int = 1
    output_hash: str | None = None
    """SHA-256 of the generated token ids."""

    @property
    def summary(self) -> Summary | None:
        """Statistics; None without samples (a counter that the device lacks)."""
        return summarise(self.samples) if self.samples else None

    @property
    def absent(self) -> str:
        """Why there may be no samples."""
        return "no counter" if self.test == "energy" else "no sample"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes results of two runs comparable."""
        return (
            self.test, self.prompt, self.provider, self.n_threads, self.batch_size,
            self.n_prompt, self.n_gen, self.n_depth, self.n_tasks,
        )  # fmt: skip

    def row(self) -> dict[str, Any]:
        """One flat row, with llama-bench's `avg_ns`, `stddev_ns`, `samples_ns` and `avg_ts` ... where they apply."""
        found = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self) if spec.name != "samples"}
        found |= dataclasses.asdict(self.summary) if self.summary else dict.fromkeys(Summary.__dataclass_fields__)
        found["samples"] = list(self.samples)
        for unit, suffix in (("ns", "ns"), ("tokens/s", "ts")):
            ours = self.summary if self.unit == unit else None
            found[f"avg_{suffix}"] = ours.mean if ours else None
            found[f"stddev_{suffix}"] = ours.stddev if ours else None
            found[f"samples_{suffix}"] = list(self.samples) if ours else None
        return found

    def genai_names(self) -> dict[str, float]:
        """The same under the names of ONNX Runtime GenAI's benchmark_e2e.py, for time to first token and decoding."""
        if self.summary is None:
            return {}
        if self.test.startswith("ttft"):
            seconds = self.summary.mean / 1e9
            return {
                "Prompt Processing Latency (ms)": seconds * 1e3,
                "Prompt Processing Throughput (tps)": self.n_prompt * self.batch_size / seconds,
            }
        if self.test == "tpot":
            return {
                "Token Generation Latency (ms)": self.summary.mean / 1e6,
                "Token Generation Throughput (tps)": self.batch_size * 1e9 / self.summary.mean,
            }
        return {}


@dataclass(frozen=True)
class Report:
    """A whole run."""

    device: Mapping[str, Any]
    package: Mapping[str, Any]
    throttling: Mapping[str, Any]
    test_time: str
    """ISO 8601, UTC."""
    results: tuple[Result, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Everything, for json."""
        tests = {result.test for result in self.results}
        return {
            "format": FORMAT,
            "version": VERSION,
            "test_time": self.test_time,
            "definitions": {name: text for name, text in DEFINITIONS.items() if name in tests},
            "excluded": EXCLUDED,
            "device": dict(self.device),
            "package": dict(self.package),
            "settings": dict(self.settings),
            "throttling": dict(self.throttling),
            "results": [result.row() | {"ort_genai": result.genai_names() or None} for result in self.results],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows, each with what identifies the run (as llama-bench has them)."""
        run = {
            "test_time": self.test_time,
            "cpu_info": self.device.get("cpu"),
            "gpu_info": ", ".join(self.device.get("gpu") or ()),
            "model_filename": self.package.get("path"),
            "model_type": self.package.get("model"),
            "model_size": self.package.get("size_bytes"),
            "package_hash": self.package.get("hash"),
            "edgeprompt_version": self.device.get("edgeprompt"),
            "onnxruntime_version": self.package.get("onnxruntime"),
        }
        return [run | result.row() for result in self.results]


MAX_RESULT = 256 << 20
"""Bytes of a result; one of 10,000 settings has 30 MB."""


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read a result that was written with --format json.

    Raises:
        InputError: no such file, or no such result.
    """
    try:
        data = json.loads(read_regular(path, MAX_RESULT).decode("utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(f"format {data['format']!r} version {data['version']!r}")
        known = [spec.name for spec in dataclasses.fields(Result)]
        results = [
            Result(**{**{key: row[key] for key in known}, "samples": tuple(row["samples"])}) for row in data["results"]
        ]
        return Report(
            data["device"], data["package"], data["throttling"], data["test_time"], tuple(results), data["settings"]
        )
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is no result of edgeprompt bench --format json: {error}") from error


def to_json(report: Report) -> str:
    """One JSON document."""
    return json.dumps(report.to_data(), indent=1) + "\n"


def to_jsonl(report: Report) -> str:
    """One JSON object per result."""
    return "".join(json.dumps(row) + "\n" for row in report.rows())


def to_csv(report: Report) -> str:
    """One line per result; lists as JSON."""
    rows = report.rows()
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
    )
    return file.getvalue()


def weights(package: Mapping[str, Any]) -> str:
    """How a package's weights are stored, as "int4, blocks of 128"."""
    block = package.get("block_size")
    return f"{package['precision']}, blocks of {block}" if block else str(package["precision"])


def to_md(report: Report) -> str:
    """Tables for people."""
    device, package = report.device, report.package
    lines = [
        f"# edgeprompt bench: {package['model']} ({weights(package)})",
        "",
        f"- {report.test_time}, edgeprompt {device['edgeprompt']}, "
        + ", ".join(f"{name} {number}" for name, number in device["versions"].items()),
        f"- {device['cpu']} ({', '.join(device['isa']) or 'no known extensions'}), "
        f"{device['cores_usable']} cores usable, governor {device['governor'] or 'unknown'}, "
        f"{readable(device['memory_bytes'], 'bytes')} memory, {device['os']}",
        *(f"- GPU: {gpu}" for gpu in device["gpu"]),
        f"- package {package['hash']}, {readable(package['size_bytes'], 'bytes')}",
        f"- clock: the same work took {report.throttling['slowdown']:.2f} times as long after as before"
        + (" (throttled, or busy with other work: do not trust these figures)" if report.throttling["seen"] else ""),
        f"- {EXCLUDED}",
        "",
        HEAD,
        "|" + " --- |" * (HEAD.count("|") - 1),
    ]
    for result in report.results:
        cells = [
            result.test, result.prompt or "", result.provider, result.n_threads or "all", result.batch_size,
            result.n_prompt, result.n_gen, result.n_depth, result.n_tasks,
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, *_shown(result))) + " |")
    tests = dict.fromkeys(result.test for result in report.results)
    lines += ["", "Definitions", "", *(f"- `{test}`: {DEFINITIONS[test]}" for test in tests), ""]
    hashes = [result for result in report.results if result.output_hash]
    if hashes:
        lines += ["Output (SHA-256 of generated token ids)", ""]
        lines += [
            f"- {result.prompt}, {result.provider}, {result.n_threads or 'all'} threads, batch {result.batch_size}: "
            f"{result.output_hash}"
            for result in hashes
        ]
        lines.append("")
    return "\n".join(lines)


def _shown(result: Result) -> list[str]:
    found = result.summary
    if found is None:
        return ["0", result.absent, *[""] * 5]
    low, middle, mean, stddev, *high = (
        readable(value, result.unit)
        for value in (found.min, found.p50, found.mean, found.stddev, found.p90, found.p95, found.p99)
    )
    return [str(found.n), low, middle, f"{mean} ± {stddev}", *high]


def readable(value: float | None, unit: str) -> str:
    """A value for people: ns as ms, bytes as MB."""
    if value is None:
        return "unknown"
    scale, name = {"ns": (1e6, "ms"), "bytes": (1e6, "MB")}.get(unit, (1, unit))
    return f"{value / scale:.4g} {name}" if abs(value / scale) < 1e4 else f"{value / scale:.0f} {name}"


TEXT_FORMATS = {"md": to_md, "csv": to_csv, "json": to_json, "jsonl": to_jsonl}
