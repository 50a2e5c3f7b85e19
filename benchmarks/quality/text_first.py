"""Prompts behind the text beside prompts in front of it: `{text}{prompt}\\n...` and `{prompt}{text}\\n...`.

    python -m benchmarks.quality.text_first [--tasks sentiment source] [--seeds 3] [--limit 1000]

Both are tuned by the recipes of the shipped prompts (`examples/prompts/make.py`): the same data, rows, steps and seeds,
for the int4 package; only the place of the virtual tokens differs. Figures are the accuracies on held-out sentences,
on that package. What lies under work/text-first/ is taken from there, so an interrupted run goes on. Results
of other tasks are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "prompts")]
from make import RECIPES, Recipe  # noqa: E402
from models import WORK, edgeprompt, edgeprompt_json, package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "text-first.json"
PLACES = {"prompt first": "{prompt}{text}", "text first": "{text}{prompt}"}


def placed(recipe: Recipe, place: str) -> Recipe:
    """The recipe with its virtual tokens at a place."""
    return dataclasses.replace(
        recipe, tune=tuple(str(word).replace(PLACES["prompt first"], PLACES[place]) for word in recipe.tune)
    )


def measure(task: str, place: str, seed: int, limit: int) -> dict[str, Any]:
    """Tune where it is not done yet, and measure on the test set."""
    recipe = placed(RECIPES[task], place)
    folder = WORK / "text-first"
    folder.mkdir(parents=True, exist_ok=True)
    prompt = folder / f"{task}-{place.replace(' ', '-')}-{seed}.safetensors"
    score = prompt.with_suffix(f".{limit}.json")
    if not prompt.exists():
        edgeprompt(*recipe.command(prompt, seed=seed))
    if not score.exists():
        (found,) = edgeprompt_json(
            *("eval", package(recipe.precision), recipe.files()[2], "--prompt", prompt),
            *("--metric", recipe.metric, "--limit", limit),
        )
        score.write_text(json.dumps({key: found[key] for key in ("metric", "value", "standard_error", "n")}))
    result: dict[str, Any] = json.loads(score.read_text())
    return result


def main() -> None:
    """Tune and measure seed by seed, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("sentiment", "source"), default=["sentiment", "source"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000, help="most held-out sentences (default: %(default)s)")
    options = parser.parse_args()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {task: {place: [] for place in PLACES} for task in options.tasks}
    for seed in range(options.seeds):
        for task in options.tasks:
            for place in PLACES:
                rows[task][place].append(measure(task, place, seed, options.limit))
                print(task, place, seed, rows[task][place][-1], flush=True)
    machine = describe()
    if RESULT.exists():
        rows = json.loads(RESULT.read_text("utf-8"))["tasks"] | rows
    RESULT.write_text(json.dumps({"machine": machine, "tasks": rows}, indent=1) + "\n", encoding="utf-8")
    print("| task | prompt first (%) | text first (%) | difference in points (standard error) |\n|---|---|---|---|")
    for task, places in rows.items():
        means = {place: 100 * statistics.mean(one["value"] for one in runs) for place, runs in places.items()}
        apart = [100 * (late["value"] - early["value"]) for early, late in zip(*places.values(), strict=True)]
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        each = {place: ", ".join(f"{100 * one['value']:.1f}" for one in runs) for place, runs in places.items()}
        shown = [f"{means[place]:.1f} ({each[place]})" for place in places]
        print(f"| {task} | {' | '.join(shown)} | {statistics.mean(apart):+.1f} ({error:.1f}) |")
    print(f"\n{line(machine)}")


if __name__ == "__main__":
    main()
