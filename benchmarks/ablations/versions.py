"""Two versions of edgeprompt, side by side: did a change cost time?

    python -m benchmarks.ablations.versions OLD NEW --case PACKAGE PROMPT [--case ...] [--rounds 9] [--threads 2]

OLD and NEW are checkouts (`git worktree add OLD COMMIT`); both run in this environment, on the same package and prompt
(made by the old version, so that both can read them). Rounds go in turn, every measurement in a process of its own;
the version that comes first changes from round to round. The table has the ratio new to old of the two measurements of
one round: the median, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line

RESULT = Path(__file__).resolve().parents[1] / "results" / "versions.json"
WORKER = Path(__file__).with_name("versions_worker.py")
TITLES = {
    "start": "process start to the first label",
    "classify": "one text, prompt resident",
    "classify_many": "64 texts in one call",
    "first_token": "first token, prompt resident",
    "decode": "a decode step",
}


def measure(checkout: Path, package: Path, prompt: Path, threads: int) -> dict[str, float]:
    """Seconds of each measurement, from a process that imports edgeprompt from `checkout`."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-P", WORKER, package, prompt, str(threads)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout.absolute()), "OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        source = process.stdout.readline().strip()
        seconds = time.perf_counter() - started
        rest = process.stdout.read()
    if process.returncode or not Path(source).is_relative_to(checkout.absolute()):
        raise SystemExit(f"{checkout}: the measurement failed, or edgeprompt came from {source or 'nowhere'}")
    return {"start": seconds, **json.loads(rest)}


def main() -> None:
    """Measure, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--case", nargs=2, action="append", type=Path, required=True, metavar=("PACKAGE", "PROMPT"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    versions = {"old": options.old, "new": options.new}
    found: dict[str, list[dict[str, dict[str, float]]]] = {package.name: [] for package, _ in options.case}
    for number in range(-1, options.rounds):
        for package, prompt in options.case:
            order = list(versions) if number % 2 else list(versions)[::-1]
            pair = {name: measure(versions[name], package, prompt, options.threads) for name in order}
            if number >= 0:  # the first round warms the file cache
                found[package.name].append(pair)
            print(f"round {number + 1} of {options.rounds}: {package.name}", file=sys.stderr)
    facts = {"machine": describe(), "threads": options.threads, "seconds": found}
    options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(facts))


def to_markdown(facts: dict[str, Any]) -> str:
    """New to old by package and measurement: median of the rounds' ratios (lowest to highest), and both medians."""
    lines = ["| package | what | old, ms | new, ms | new / old |", "| --- | --- | --- | --- | --- |"]
    for package, rounds in facts["seconds"].items():
        for what in [name for name in TITLES if name in rounds[0]["old"]]:
            old, new = ([pair[version][what] for pair in rounds] for version in ("old", "new"))
            ratios = sorted(after / before for before, after in zip(old, new, strict=True))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            medians = " | ".join(f"{1e3 * statistics.median(values):.2f}" for values in (old, new))
            lines.append(f"| {package} | {TITLES[what]} | {medians} | {ratio} |")
    return "\n".join([*lines, "", f"{facts['threads']} threads. {line(facts['machine'])}"])


if __name__ == "__main__":
    main()
