"""Runs the peers in turn, several rounds, every measurement in a fresh process and only one process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.cores import APART, round_trip
from benchmarks.peers.environments import HERE, PEERS, Peer, python_of

WORKER = HERE / "workers/worker.py"
LIMIT = 900
"""Seconds that one worker may take."""


def run_rounds(
    work: Path,
    *,
    rounds: int,
    chosen: tuple[Peer, ...] = PEERS,
    pythons: dict[str, Path],
    environments: Path,
    threads: int,
    tries: int = 3,
    quick: bool = False,
    tell: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure; `keep` gets after every round what is there: the machine's ceiling, and the peers.

    Each is {"title", "rounds": [...]} or {"title", "absent": why}. A measurement is made `tries` times at most, for one
    during which the cores stay together.
    """
    found: dict[str, Any] = {peer.name: {"title": peer.title, "ours": peer.ours, "rounds": []} for peer in chosen}
    ready: list[tuple[Peer, Path]] = []
    for peer in chosen:
        tell(f"{peer.name}: environment")
        try:
            python = python_of(peer, environments, pythons)
            _lines(start_worker(peer, python, work, "prepare"))
            ready.append((peer, python))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            found[peer.name]["absent"] = _said(error, work)
            tell(f"{peer.name}: absent, {error}")
    ceiling: list[float] = []
    trips = [trip for _ in range(5) if (trip := round_trip()) is not None]
    for number in range(rounds):
        ceiling += _ceiling(threads)
        turn = number % max(1, len(ready))
        for peer, python in [*ready[turn:], *ready[:turn]]:
            tell(f"round {number + 1} of {rounds}: {peer.name}")
            try:
                found[peer.name]["rounds"].append(
                    _undisturbed(partial(_measure, peer, python, work, quick), trips, tries)
                )
            except (RuntimeError, subprocess.SubprocessError) as error:
                found[peer.name]["absent"] = _said(error, work)
                tell(f"{peer.name}: failed, {error}")
        ready = [(peer, python) for peer, python in ready if "absent" not in found[peer.name]]
        keep({"ceiling_bytes_per_second": ceiling, "peers": found})


def _said(error: BaseException, work: Path) -> str:
    """The error without the folder of this machine."""
    return str(error).replace(f"{work.parent}/", "")


def _undisturbed(measure: Callable[[], dict[str, Any]], trips: list[float], most: int) -> dict[str, Any]:
    """A measurement with cores together before and after it, or the last of `most`; `trips` grows."""
    for tries in range(1, most + 1):
        before = round_trip()
        result = measure()
        after = round_trip()
        result |= {"core_round_trip_ns": [before, after], "tries": tries}
        if before is None or after is None:
            break
        trips += [before, after]
        if max(before, after) <= APART * min(trips):
            break
    return result


def _measure(peer: Peer, python: Path, work: Path, quick: bool) -> dict[str, Any]:
    memory = _lines(start_worker(peer, python, work, "cold"))
    result = _lines(start_worker(peer, python, work, "full", *(("quick",) if quick else ())))[-1]
    return {**result, "peak_rss": memory[-1]["peak_rss"]}


def start_worker(peer: Peer, python: Path, work: Path, mode: str, *more: str) -> subprocess.Popen[str]:
    """A peer's process, which prints a JSON object a line; `mode` and what it says stand in `workers/worker.py`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [python, WORKER, peer.module, peer.variant, work, mode, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _lines(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The rest of what a worker says.

    Raises:
        RuntimeError: it failed; its last line.
    """
    try:
        out, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not found:
        raise RuntimeError((errors.strip().splitlines() or ["no output"])[-1])
    return found


def _ceiling(threads: int) -> list[float]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "ceiling.py", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [float(value) for value in done.stdout.split()]
