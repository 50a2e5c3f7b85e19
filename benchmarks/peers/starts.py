"""How long every peer takes from the start of its process to its first label, with its files in memory and on disk.

    python -m benchmarks.peers.starts [--folder work/bench/smollm2] [--starts 7]

Every start is a process of its own, in turn over the peers, which `python -m benchmarks` has made ready. Files in
memory: the system's page cache holds them, since the peer was started once just before. On disk: the model, the prompt
and the libraries of the peer are dropped from the page cache before each start, as after a boot (Linux only; the
interpreter itself stays).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line
from benchmarks.peers.environments import PEERS, Peer, python_of
from benchmarks.peers.rounds import start_worker

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).resolve().parents[1] / "results" / "starts.json"
STATES = ("files in memory", "files on disk")
OURS = "edgeprompt, int8"
"""Whose ratios the table shows."""


def first_label(peer: Peer, python: Path, work: Path) -> float:
    """Seconds from the start of a process to its first label.

    Raises:
        RuntimeError: it gave none.
    """
    started = time.perf_counter()
    process = start_worker(peer, python, work, "cold")
    assert process.stdout is not None
    said = process.stdout.readline()
    found = time.perf_counter() - started
    process.kill()
    _, errors = process.communicate()
    if "label" not in said:
        raise RuntimeError((errors.strip().splitlines() or ["no label"])[-1])
    return found


def drop_from_memory(folders: list[Path]) -> None:
    """Ask the system to drop the files below `folders` from its page cache."""
    for folder in folders:
        for file in folder.rglob("*") if folder.is_dir() else [folder]:
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)


def files_of(work: Path, python: Path) -> list[Path]:
    """What a start reads: models and prompts, the libraries of its environment."""
    told = json.loads(work.read_text(encoding="utf-8"))
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    models = [*work.parent.iterdir()]
    return [*models, Path(told["gguf"]), Path(paths.stdout.strip())]


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "work/bench/smollm2")
    parser.add_argument("--starts", type=int, default=7, help="of each peer, files in memory and on disk")
    options = parser.parse_args()
    work = options.folder.absolute() / "work.json"
    if not work.is_file():
        raise SystemExit(f"{options.folder} is not ready; python -m benchmarks --quick makes it")
    os.sync()  # only what is written can be dropped
    found: dict[str, dict[str, Any]] = {}
    ready: list[tuple[Peer, Path, list[Path]]] = []
    for peer in PEERS:
        try:
            python = python_of(peer, work.parents[1] / "environments", {})
            first_label(peer, python, work)
            ready.append((peer, python, files_of(work, python)))
            found[peer.title] = {state: [] for state in STATES}
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            found[peer.title] = {"absent": str(error)}
    for _ in range(options.starts):
        for peer, python, files in ready:
            drop_from_memory(files)
            for state in reversed(STATES):
                found[peer.title][state].append(first_label(peer, python, work))
    facts = {"machine": describe(), "seconds": found}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(facts))


def to_markdown(facts: dict[str, Any]) -> str:
    """Medians with their ratio to ours: above 1, ours starts sooner (lowest to highest of any two starts)."""
    heads = [cell for state in STATES for cell in (f"{state} (s)", "ratio")]
    lines = [f"| first label | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    ours = facts["seconds"][OURS]
    for title, starts in facts["seconds"].items():
        cells = []
        for state in STATES:
            if "absent" in starts:
                cells += ["absent", ""]
                continue
            ratios = [theirs / mine for theirs, mine in product(starts[state], ours[state])]
            middle = statistics.median(starts[state]) / statistics.median(ours[state])
            cells += [
                f"{statistics.median(starts[state]):.3g}",
                f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    count = max(len(starts.get(STATES[0], ())) for starts in facts["seconds"].values())
    note = f"Seconds from the start of the process, {count} starts each; ratios are to {OURS}."
    return "\n".join([*lines, "", f"{note} {line(facts['machine'])}"])


if __name__ == "__main__":
    main()
