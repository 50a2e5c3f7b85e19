"""Whether a sentiment prompt keeps its accuracy on a 4-bit package, or on one for the web.

    python -m benchmarks.quality.accuracy [--package int4] [--steps N] [--seeds 3] [--limit N] [--out FILE]
    python -m benchmarks.quality.accuracy --package web --beside int8

Tunes the shipped sentiment recipe with several seeds for the package (the first for int4 is the shipped prompt itself)
and serves every prompt on it and on the fp32 package, on all four test sets, beside zero-shot. With `--beside`, prompts
are tuned for either package and served on it. Both packages see the
same sentences, so the error of the difference is that of pairs. Prompts and answers that exist under work/ already are
taken from there, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe, line
from edgeprompt import load, load_prompt
from edgeprompt.evaluation.data import read_records
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.hard_prompt import hard_prompt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "prompts")]
from make import RECIPES  # noqa: E402
from models import WORK, edgeprompt, package  # noqa: E402

SETS = ("movie", "product", "tweets", "news")
RECIPE = RECIPES["sentiment"]
SHIPPED = ROOT / "examples" / "prompts" / "sentiment.safetensors"
PLAIN, SHIPPED_FOR = "fp32", "int4"
ZERO_SHOT = "zero-shot"
FOLDER = WORK / "accuracy"


def prompt(seed: int, tuned_for: str, steps: int | None) -> Path:
    """The prompt of one seed, tuned if it is not there yet."""
    if (seed, tuned_for, steps) == (0, SHIPPED_FOR, None):
        return SHIPPED
    stem = f"{tuned_for}-{steps or 'recipe'}-seed-{seed}"
    path = FOLDER / f"{stem}.safetensors"
    if not path.exists():
        command = dataclasses.replace(RECIPE, precision=tuned_for).command(path, seed=seed)
        more = () if steps is None else ("--steps", steps)
        edgeprompt(*command, *more, "--log", FOLDER / f"{stem}.log")
    return path


def answers(served: str, prompts: list[Path], limit: int | None) -> dict[str, dict[str, list[int]]]:
    """Prompt -> test set -> for each of its sentences whether the package's answer is right (1) or not (0)."""
    folder = package(served)
    version = open_package(folder).manifest.weights_hash.removeprefix("sha256:")[:12]
    found: dict[str, dict[str, list[int]]] = {}
    with load(folder) as runtime:
        zero = hard_prompt(load_prompt(prompts[0]), "", name=ZERO_SHOT)
        wanted: dict[str, Any] = {ZERO_SHOT: zero}
        wanted |= {f"seed {seed}": load_prompt(path) for seed, path in enumerate(prompts)}
        for name, file in wanted.items():
            content = name if name == ZERO_SHOT else file.sha256[:12]
            path = FOLDER / f"{served}-{version}-{content}-{limit}.json"
            if not path.exists():
                runtime.add_prompt(file, name=name, allow_other_weights=True)
                path.write_text(json.dumps({data: right(runtime, name, data, limit) for data in SETS}))
            found[name] = json.loads(path.read_text())
            print(served, name, {data: f"{np.mean(row):.3f}" for data, row in found[name].items()}, flush=True)
    return found


def right(runtime: Any, name: str, data: str, limit: int | None) -> list[int]:
    """Which answers are right on one test set."""
    rows = list(islice(read_records(WORK / "data" / f"{data}.test.csv"), limit))
    found = runtime.classify([row["text"] for row in rows], prompt=name)
    return [int(answer.label == row["label"]) for answer, row in zip(found, rows, strict=True)]


def summary(rows: list[list[int]]) -> dict[str, Any]:
    """Mean and spread over seeds in per cent, and the standard error that the sentences give it."""
    means = [float(100 * np.mean(row)) for row in rows]
    error = float(100 * np.std(np.mean(rows, axis=0), ddof=1) / np.sqrt(len(rows[0])))
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return {"mean": statistics.mean(means), "stddev": spread, "standard_error": error, "samples": means}


def main() -> None:
    """Run what is missing, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--package", default=SHIPPED_FOR, help='as "int4-128" (blocks of 128); prompts are tuned for it'
    )
    parser.add_argument("--beside", default=PLAIN, help="another package, with prompts tuned for it")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="first sentences of each set alone (the sets are in random order)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/accuracy[-PACKAGE].json")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    pair = (options.beside, options.package)
    prompts = {
        served: [
            prompt(seed, options.package if served == PLAIN else served, options.steps) for seed in range(options.seeds)
        ]
        for served in pair
    }
    found = {served: answers(served, prompts[served], options.limit) for served in pair}
    seeds = [f"seed {seed}" for seed in range(options.seeds)]
    rows: dict[str, dict[str, Any]] = {}
    for title, names in (("zero-shot", [ZERO_SHOT]), ("soft prompt", seeds)):
        for served in pair:
            rows[f"{title}, {served}"] = {data: summary([found[served][n][data] for n in names]) for data in SETS}
        first, second = pair
        rows[f"{title}, {second} less {first}"] = {
            data: summary([np.subtract(found[second][n][data], found[first][n][data]).tolist() for n in names])
            for data in SETS
        }
    machine = describe()
    facts = {
        "machine": machine,
        "steps": [load_prompt(path).training["steps"] for path in prompts[options.package]],
        "sentences": {data: len(found[options.package][ZERO_SHOT][data]) for data in SETS},
    }
    suffix = "" if options.package == SHIPPED_FOR else f"-{options.package}"
    out = options.out or ROOT / "benchmarks" / "results" / f"accuracy{suffix}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, "accuracy": rows}, indent=1) + "\n")
    heads = [f"{data} (n = {facts['sentences'][data]})" for data in SETS]
    print(f"| prompt | {' | '.join(heads)} | mean |\n|---|" + "---|" * (len(SETS) + 1))
    for title, sets in rows.items():
        cells = [
            f"{sets[data]['mean']:.1f} ± {sets[data]['stddev']:.1f} ({sets[data]['standard_error']:.1f})"
            for data in SETS
        ]
        print(f"| {title} | {' | '.join(cells)} | {statistics.mean(sets[data]['mean'] for data in SETS):.1f} |")
    print(f"\n{line(machine)}")


if __name__ == "__main__":
    main()
