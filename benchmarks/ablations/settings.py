"""What ONNX Runtime's session settings do to a decode step and a prefill.

    python -m benchmarks.ablations.settings [--threads 2] [--folder work/bench/smollm2] [--turns 24]

The same graph is open once for each setting (`python -m benchmarks` makes the packages); all take turns, and every
turn begins with another one, since whoever comes first behind another graph finds the caches cold. Where its weights
lie in memory makes a session up to a tenth slower or faster as long as it is open: the second row, which has the first
row's settings, tells how much of a difference that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ablations.operators import ROOT, TEXT, open_step, turn
from benchmarks.machine import describe, line
from benchmarks.peers.bases import EIGHT, LARGE_BLOCKS
from edgeprompt.ort.session import SPIN_MICROSECONDS
from edgeprompt.package.folder import open_package

RESULT = Path(__file__).resolve().parents[1] / "results" / "settings.json"
PACKAGES = {"int4, blocks of 128": LARGE_BLOCKS, "int8": EIGHT}
PLAIN = "ONNX Runtime's own"
Change = Callable[[Any], None]


def _entry(name: str, value: str) -> Change:
    return lambda options: options.add_session_config_entry(name, value)


def _attribute(name: str, value: object) -> Change:
    return lambda options: setattr(options, name, value)


def settings(threads: int) -> dict[str, Change]:
    """Title -> change of the session's options."""
    others = ";".join(str(core) for core in range(2, threads + 1))  # the calling thread keeps its freedom
    found = {
        PLAIN: lambda options: None,
        "the same once more": lambda options: None,
        "one thread": _attribute("intra_op_num_threads", 1),
        "threads never spin": _entry("session.intra_op.allow_spinning", "0"),
        "threads spin for 1 ms at most, as here": _entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS)),
        "smaller pieces of work": _entry("session.dynamic_block_base", "4"),
        "no memory pattern": _attribute("enable_mem_pattern", False),
        "no arena": _attribute("enable_cpu_mem_arena", False),
        "denormals are zero": _entry("session.set_denormal_as_zero", "1"),
    }
    if others:
        found["threads tied to cores"] = _entry("session.intra_op_thread_affinities", others)
    return found


def measure(path: Path, threads: int, turns: int) -> dict[str, dict[str, list[float]]]:
    """Setting -> "prefill" and "decode" -> milliseconds of every turn."""
    size = open_package(path).manifest.geometry
    graphs = {
        title: open_step(path / "model.onnx", size, threads, change=change)[1]
        for title, change in settings(threads).items()
    }
    found: dict[str, dict[str, list[float]]] = {title: {"prefill": [], "decode": []} for title in graphs}
    order = list(graphs)
    for number in range(1 + turns):
        for title in order:
            prefill, steps = turn(graphs[title], size.vocab_size, number)
            if number:  # the first turn warms up
                found[title]["prefill"].append(1e3 * prefill)
                found[title]["decode"].append(1e3 * statistics.median(steps))
        order = [*order[1:], order[0]]
    return found


def main() -> None:
    """Measure, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "work/bench/smollm2")
    parser.add_argument("--turns", type=int, default=24)
    options = parser.parse_args()
    missing = [name for name in PACKAGES.values() if not (options.folder / name).is_dir()]
    if missing:
        raise SystemExit(f"{options.folder} lacks {', '.join(missing)}; python -m benchmarks --quick makes them")
    found = {title: measure(options.folder / name, options.threads, options.turns) for title, name in PACKAGES.items()}
    facts = {"machine": describe(), "threads": options.threads, "text": TEXT, "milliseconds": found}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(facts))


def to_markdown(facts: dict[str, Any]) -> str:
    """Times relative to the first row's of the same turn: medians, and the range that holds eight of ten turns."""
    packages = facts["milliseconds"]
    heads = [f"{package}, {kind}" for package in packages for kind in ("decode step", f"prefill of {facts['text']}")]
    lines = [f"| settings | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for title in next(iter(packages.values())):
        cells = []
        for found in packages.values():
            for kind in ("decode", "prefill"):
                ratios = [mine / plain for mine, plain in zip(found[title][kind], found[PLAIN][kind], strict=True)]
                tenths = statistics.quantiles(ratios, n=10)
                cell = f"{statistics.median(ratios):.2f} ({tenths[0]:.2f} to {tenths[-1]:.2f})"
                cells.append(f"{statistics.median(found[title][kind]):.2f} ms" if title == PLAIN else cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{facts['threads']} threads. {line(facts['machine'])}"])


if __name__ == "__main__":
    main()
