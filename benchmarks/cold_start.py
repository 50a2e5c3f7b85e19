"""Where a cold start goes, from the start of the process to the first label.

    python -m benchmarks.cold_start [--folder work/bench] [--processes 15]

Every start is a process of its own, as in the comparison with peers (`python -m benchmarks` makes the packages), in
turn over the packages, with the packed graph and the prompt's keys and values on disk as the second start on a device
finds them. The clock is the machine's monotonic one, which parent and child share.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "cold-start.json"
PACKAGES = {
    "int4": "int4-genai",
    "int4, blocks of 128": "int4-128-genai",
    "int8": "int8-genai",
}
STAGES = ("Python", "numpy", "edgeprompt", "ONNX Runtime", "session and tokenizer", "prompt", "first label")
"""What lies between two readings of the clock; "edgeprompt" includes the imports of safetensors and tokenizers. The
tokenizer is read beside the session."""
ALONE = ("session alone", "tokenizer alone")
"""Measured one after the other behind all that."""


def start(package: str, folder: str, started: float) -> None:
    """The child: one start, stage by stage, then session and tokenizer alone; prints seconds of each."""
    times = [time.monotonic()]

    def stage() -> None:
        times.append(time.monotonic())

    import numpy  # noqa: F401

    stage()
    import edgeprompt.engines.decoder  # noqa: F401
    from edgeprompt.engines import EngineOptions, open_engine_session
    from edgeprompt.package import open_package
    from edgeprompt.runtime import Runtime

    stage()
    import onnxruntime  # noqa: F401

    stage()
    options = EngineOptions(provider="cpu", threads=2, cache_folder=Path(folder) / "packed")
    runtime = Runtime(open_package(Path(folder) / package), options)
    stage()
    runtime.add_prompt(Path(folder) / "prompt-16/sentiment.safetensors")
    stage()
    with (ROOT / "examples/data/movie.test.csv").open(encoding="utf-8", newline="") as file:
        text = next(csv.DictReader(file))["text"]
    runtime.classify(text, prompt="sentiment")
    stage()
    runtime.close()
    alone = open_package(Path(folder) / package)
    _ = alone.tokenizer
    before = time.monotonic()
    open_engine_session(alone, "model", options)
    opened = time.monotonic()
    _ = open_package(Path(folder) / package).tokenizer
    more = [opened - before, time.monotonic() - opened]
    print(json.dumps([times[0] - started, *(after - before for before, after in pairwise(times)), *more]))


def measure(package: str, folder: Path) -> list[float]:
    """Seconds of every stage of one process, then of `ALONE`."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "benchmarks.cold_start", "--child", package, str(folder), repr(time.monotonic())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    found: list[float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure in turn, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "work/bench")
    parser.add_argument("--processes", type=int, default=15, help="starts of each package, after one that packs")
    options = parser.parse_args()
    folder = options.folder.absolute()
    missing = [name for name in PACKAGES.values() if not (folder / name).is_dir()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; python -m benchmarks --quick makes them")
    samples: dict[str, list[list[float]]] = {title: [] for title in PACKAGES}
    for number in range(1 + options.processes):
        for title, package in PACKAGES.items():
            found = measure(package, folder)
            if number:
                samples[title].append(found)
    from benchmarks.machine import describe

    facts = {"machine": describe(), "stages": STAGES + ALONE, "seconds": samples}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(facts))


def to_markdown(facts: dict[str, Any]) -> str:
    """Medians of the stages and of the whole, in milliseconds, with the range that holds eight of ten starts."""
    from benchmarks.machine import line

    lines = [f"| package | {' | '.join([*STAGES, 'all (10th to 90th percentile)', *ALONE])} |"]
    lines.append(f"| --- |{' --- |' * (len(facts['stages']) + 1)}")
    for title, starts in facts["seconds"].items():
        cells = [f"{1e3 * statistics.median(values):.0f}" for values in zip(*starts, strict=True)]
        whole = sorted(1e3 * sum(values[: len(STAGES)]) for values in starts)
        tenths = statistics.quantiles(whole, n=10)
        cells.insert(len(STAGES), f"{statistics.median(whole):.0f} ({tenths[0]:.0f} to {tenths[-1]:.0f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Milliseconds. {line(facts['machine'])}"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        start(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main()
