"""Where a decode step and a prefill go, operator by operator, with ONNX Runtime's profiler.

    python -m benchmarks.ablations.operators [--threads 2] [--folder work/bench/smollm2]

The graphs are those of the comparison with peers (`python -m benchmarks` makes them): ours, and that of
onnxruntime-genai's builder, all run in the same way, on the same caches, in turn. The profiler adds some microseconds
to every operator, so each graph is run without it too: that is the time a step takes, and the profile says how it
divides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe, line
from benchmarks.peers.environments import PEERS
from edgeprompt.engines.decoder.graph import DecoderGraph, open_graph
from edgeprompt.ort.kv_cache import KVShape
from edgeprompt.ort.session import Session, import_onnxruntime
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Geometry

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).resolve().parents[1] / "results" / "operators.json"
GRAPHS = {peer.title: peer.variant for peer in PEERS if peer.ours or peer.name == "genai-pruned"}
"""Folder of each graph, by title."""
PREFIX, TEXT = 16, 32
STEPS, TURNS = 32, 12
"""Decode steps of a turn, behind prefix and text, and how often every graph has its turn."""
GROUPS = {
    "matmuls": ("MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Gemm"),
    "attention": ("GroupQueryAttention",),
    "norms": ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization"),
    "activations": ("QuickGelu", "Sigmoid", "Mul"),
    "reductions": ("MatMul", "Concat", "FusedMatMul"),
}
"""What operators are for ("reductions": sums of activations over blocks); all others are "other"."""


def open_step(
    path: Path,
    size: Geometry,
    threads: int,
    profile: str | None = None,
    change: Callable[[Any], None] = lambda options: None,
) -> tuple[Any, DecoderGraph]:
    """A graph file on the runtime's caches, its session first, with ONNX Runtime's own settings but for `change`."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The threads of one graph would spin on while the next is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    change(options)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = KVShape(size.num_layers, size.num_key_value_heads, size.head_size, "float32")
    runs = open_graph(
        Session(session, "cpu", "cpu"),
        shape,
        in_place=True,
        hidden_size=size.hidden_size,
        max_rows=1,
        budget=1 << 30,
    )
    return session, runs


def turn(graph: DecoderGraph, vocab_size: int, seed: int) -> tuple[float, list[float]]:
    """Seconds of a prefill of `TEXT` random tokens behind `PREFIX`, and of each of `STEPS` decode steps after it."""
    ids: npt.NDArray[np.int64] = np.random.default_rng(seed).integers(0, vocab_size, PREFIX + TEXT + STEPS)
    graph.place(0, (), PREFIX + TEXT + STEPS, 0)
    graph.prefill(0, ids[:PREFIX].tolist(), 0, None)
    started = time.perf_counter()
    graph.prefill(0, ids[PREFIX : PREFIX + TEXT].tolist(), PREFIX, None)
    prefill = time.perf_counter() - started
    found = []
    for length in range(PREFIX + TEXT, PREFIX + TEXT + STEPS):
        started = time.perf_counter()
        graph.decode_one(0, int(ids[length]), length)
        found.append(time.perf_counter() - started)
    return prefill, found


def profile(path: Path, size: Geometry, threads: int) -> dict[str, dict[str, Any]]:
    """For "prefill" and "decode": operator -> [milliseconds, calls] of one run, medians over runs."""
    with tempfile.TemporaryDirectory() as folder:
        session, graph = open_step(path, size, threads, str(Path(folder) / "profile"))
        for seed in range(4):
            turn(graph, size.vocab_size, seed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: list[list[dict[str, Any]]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["name"] == "model_run":
            runs.append([])
        elif event["cat"] == "Node" and event["name"].endswith("_kernel_time") and runs:
            runs[-1].append(event)
    warm = runs[len(runs) // 2 :]
    return {
        kind: _medians([run for run in warm if _rows(run) == rows]) for kind, rows in (("prefill", TEXT), ("decode", 1))
    }


def _rows(run: list[dict[str, Any]]) -> int:
    """Tokens that a run was about: the second dimension of its first attention's queries."""
    attention = next(event for event in run if event["args"]["op_name"] == "GroupQueryAttention")
    shape = next(iter(attention["args"]["input_type_shape"][0].values()))
    return int(shape[1])


def _medians(runs: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    calls: Counter[str] = Counter(event["args"]["op_name"] for event in runs[0])
    for name, count in calls.items():
        times = [sum(event["dur"] for event in run if event["args"]["op_name"] == name) / 1e3 for run in runs]
        found[name] = [statistics.median(times), count]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def main() -> None:
    """Measure all graphs in turn, then profile each; write the result and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "work/bench/smollm2")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    paths = {title: options.folder / name / "model.onnx" for title, name in GRAPHS.items()}
    missing = [path.parent.name for path in paths.values() if not path.is_file()]
    if missing:
        raise SystemExit(f"{options.folder} lacks {', '.join(missing)}; python -m benchmarks --quick makes them")
    size = open_package(options.folder / GRAPHS["edgeprompt, int4, genai route"]).manifest.geometry
    graphs = {title: open_step(path, size, options.threads)[1] for title, path in paths.items()}
    samples: dict[str, dict[str, list[float]]] = {title: {"prefill": [], "decode": []} for title in paths}
    for number in range(1 + TURNS):
        for title, graph in graphs.items():
            prefill, steps = turn(graph, size.vocab_size, number)
            if number:  # the first turn warms up
                samples[title]["prefill"].append(1e3 * prefill)
                samples[title]["decode"].append(1e3 * statistics.median(steps))
    graphs.clear()
    found = {
        title: {"milliseconds": samples[title], "operators": profile(path, size, options.threads)}
        for title, path in paths.items()
    }
    machine = describe()
    facts = {"machine": machine, "threads": options.threads, "prefix": PREFIX, "text": TEXT, "graphs": found}
    options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(facts))


def to_markdown(facts: dict[str, Any]) -> str:
    """A table for decode steps and one for prefills: time without the profiler, and what it says of the parts."""
    lines: list[str] = []
    for kind, title in (("decode", "decode step"), ("prefill", f"prefill of {facts['text']} tokens")):
        groups = [*GROUPS, "other"]
        lines += [
            f"| {title} | ms (lowest to highest turn) | operators | {' | '.join(groups)} |",
            f"| --- | --- | --- |{' --- |' * len(groups)}",
        ]
        for graph, found in facts["graphs"].items():
            times, operators = found["milliseconds"][kind], found["operators"][kind]
            parts = dict.fromkeys(groups, 0.0)
            for name, (milliseconds, _) in operators.items():
                parts[next((group for group, there in GROUPS.items() if name in there), "other")] += milliseconds
            cells = [f"{parts[name]:.2f}" for name in groups]
            count = sum(int(calls) for _, calls in operators.values())
            lines.append(
                f"| {graph} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {count} | "
                f"{' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join([*lines, f"{facts['threads']} threads. {line(facts['machine'])}"])


if __name__ == "__main__":
    main()
