"""Rows a second through Ray on this machine: tasks shuffled and sorted, one actor and two, and what the actors share.

    python -m benchmarks.ablations.cluster PACKAGE PROMPT [--rows 100000] [--prompts 2000] [--rounds 1]
        [--ways NUMBER ...] [--out FILE]

PROMPT is copied under other names with noise on its virtual tokens, so that every task has tensors of its own. The
records are film-review snippets, each with its number, so that none is answered twice. Every run is `edgeprompt run
--engine ray`, with a cluster of its own. The rate counts from the first batch that was answered, so without the start
of the cluster; `wall_s` has it. While a run lasts, the resident and the proportional set size (RSS, PSS) of the actors
are read, and of the packed weights in them. The load average says how quiet the machine was. Runs are added to the
result of the same package, prompts, threads and machine, each with its day.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import edgeprompt
from benchmarks import machine
from edgeprompt import EngineOptions
from edgeprompt.ray.answers import open_shared

ROOT = Path(__file__).resolve().parents[2]
WAYS = (("shuffled", 2), ("sorted", 2), ("shuffled", 1))
MIB = 1 << 20
SAMPLED = 15
"""Seconds between two readings of the memory: each takes the kernel a quarter of a second of a core."""


def make_prompts(source: Path, folder: Path, count: int) -> None:
    """Copies of a prompt, each with other virtual tokens."""
    prompt = edgeprompt.load_prompt(source)
    rng = np.random.default_rng(0)
    for number in range(count):
        name = f"task{number:05}"
        tokens = prompt.prompt_embeddings
        if tokens is not None:
            tokens = tokens + rng.normal(0, 0.01, tokens.shape).astype(np.float32)
        edgeprompt.save_prompt(replace(prompt, name=name, prompt_embeddings=tokens), folder / f"{name}.safetensors")


def make_records(folder: Path, rows: int, prompts: int) -> None:
    """The same records as two parquet files: in random order, and sorted by task."""
    import pyarrow
    import pyarrow.parquet

    with (ROOT / "examples" / "data" / "movie.train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    rng = random.Random(0)
    records = [
        {"task": f"task{rng.randrange(prompts):05}", "text": f"{number} {texts[number % len(texts)]}"}
        for number in range(rows)
    ]
    for name, found in (("shuffled", records), ("sorted", sorted(records, key=lambda record: record["task"]))):
        table = pyarrow.Table.from_pylist(found)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4096)


def actors_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that answer."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "MapWorker(MapBatches(FileAnswers" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def memory_of(actors: list[psutil.Process]) -> list[dict[str, float]]:
    """MiB of each actor, and of the packed weights in it."""
    found = []
    for actor in actors:
        try:
            whole = actor.memory_full_info()
            weights = [one for one in actor.memory_maps(grouped=True) if one.path.endswith("graph.onnx.data")]
        except psutil.Error:
            continue
        sizes = {"rss": whole.rss, "pss": whole.pss}
        sizes |= {f"weights_{name}": sum(getattr(one, name) for one in weights) for name in ("rss", "pss")}
        found.append({name: round(size / MIB, 1) for name, size in sizes.items()})
    return found


def measure(package: Path, prompts: Path, source: Path, folder: Path, actors: int, threads: int) -> dict[str, Any]:
    """One run."""
    command = [sys.executable, "-m", "edgeprompt", "run", package, "--prompts", prompts, "--prompt-column", "task"]
    command += ["--input", source, "--output", folder / "out", "--engine", "ray", "--actors", actors]
    command += ["--threads", threads, "--cache", folder / "cache", "--on-error", "stop"]
    load, started = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    memory: list[dict[str, float]] = []
    waited = 0
    while process.poll() is None:
        time.sleep(1)
        waited += 1
        if waited % SAMPLED:
            continue
        try:
            sample = memory_of(actors_of(psutil.Process(process.pid)))
            memory = sample if len(sample) >= len(memory) else memory  # the last one with all actors
        except psutil.Error:
            break
    _, err = process.communicate()
    wall = time.monotonic() - started
    assert process.returncode == 0, err
    told = re.search(r"note: (\d+) rows answered, ([\d.]+) rows/s", err)
    assert told is not None, err
    for path in (folder / "out").iterdir():
        path.unlink()
    (folder / "out").rmdir()
    rows, rate = int(told[1]), float(told[2])
    return {"rows": rows, "rows_per_s": rate, "wall_s": round(wall, 1), "load_average_before": load, "memory": memory}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("prompt", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1, help="Of an actor.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", type=int, nargs="+", default=[*range(len(WAYS))], help=f"Numbers from 0, of {WAYS}.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cluster.json")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {f"{order}, {actors} actors": [] for order, actors in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts").mkdir()
        make_prompts(options.prompt, folder / "prompts", options.prompts)
        make_records(folder, options.rows, options.prompts)
        engine = EngineOptions(threads=options.threads, cache_folder=folder / "cache")
        open_shared(options.package, engine).close()  # packed once, before all
        for _ in range(options.rounds):
            for order, actors in (WAYS[way] for way in options.ways):
                one = measure(
                    options.package, folder / "prompts", folder / f"{order}.parquet", folder, actors, options.threads
                )
                print(order, actors, json.dumps(one), flush=True)
                found[f"{order}, {actors} actors"].append(one)
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    described = machine.describe()
    day = described.pop("day")
    facts = {"prompts": options.prompts, "threads": options.threads, "ray": version("ray"), "machine": described}
    found = {way: [{"day": day, **run} for run in runs] for way, runs in found.items()}
    before = results.get(options.package.name, {})
    if all(before.get(name) == fact for name, fact in facts.items()):
        found = {way: before["runs"].get(way, []) + runs for way, runs in found.items()}
    results[options.package.name] = {"runs": found, **facts}
    options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
