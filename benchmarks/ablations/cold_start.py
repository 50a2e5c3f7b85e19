"""Where a cold start goes, from the start of the process to the first label.

    python -m benchmarks.ablations.cold_start [--folder work/bench/smollm2] [--processes 15]

Every start is a process of its own, as in the comparison with peers (`python -m benchmarks` makes the packages and
the environment), in turn over the packages, with the packed graph and the prompt's keys and values on disk as the
second start on a device finds them. The clock is the machine's monotonic one, which parent and child share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.bases import EIGHT, FILE, LARGE_BLOCKS

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).resolve().parents[1] / "peers" / "workers" / "stages.py"
RESULT = Path(__file__).resolve().parents[1] / "results" / "cold-start.json"
PACKAGES = {
    "the file's blocks": FILE,
    "int4, blocks of 128": LARGE_BLOCKS,
    "int8": EIGHT,
}
STAGES = ("Python", "`edgeprompt.load`", "numpy", "ONNX Runtime", "session", "prompt", "first label")
"""What lies between two readings of the clock. Beside the session are what else edgeprompt imports, and the tokenizer;
the second stage is the import of what begins it."""
ALONE = ("session alone", "imports alone", "tokenizer alone")
"""What goes on side by side, one after the other, in processes of their own."""


def measure(python: Path, package: str, folder: Path) -> list[float]:
    """Seconds of every stage of one process, then of `ALONE`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
    found: list[float] = []
    for kind in ("start", "alone"):
        command = [python, CHILD, kind, str(folder), package, repr(time.monotonic())]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found += json.loads(done.stdout)
    return found


def main() -> None:
    """Measure in turn, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "work/bench/smollm2")
    parser.add_argument("--processes", type=int, default=15, help="starts of each package, after one that packs")
    options = parser.parse_args()
    folder = options.folder.absolute()
    missing = [name for name in PACKAGES.values() if not (folder / name).is_dir()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; python -m benchmarks --quick makes them")
    from benchmarks.machine import describe
    from benchmarks.peers.environments import PEERS, python_of

    python = python_of(next(peer for peer in PEERS if peer.ours), folder.parent / "environments", {})
    samples: dict[str, list[list[float]]] = {title: [] for title in PACKAGES}
    for number in range(1 + options.processes):
        for title, package in PACKAGES.items():
            found = measure(python, package, folder)
            if number:
                samples[title].append(found)
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
    main()
