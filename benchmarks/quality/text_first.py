"""Prompts behind the text beside prompts in front of it: `{text}{prompt}\\n...` and `{prompt}{text}\\n...`.

    python -m benchmarks.quality.text_first [--tasks sentiment source] [--places ...] [--seeds 3] [--limit 1000]

All are tuned by the recipes of the shipped prompts (`examples/prompts/make.py`): the same data, rows and seeds, for the
int4 package. The virtual tokens behind the text have the same steps and rate, too. The infix (keys and values behind
the text) has twice the steps and a rate of 0.01; its steps need no gradients of the text. Figures are the
accuracies on held-out sentences, on that package. What lies under work/text-first/ is taken from there, so an
interrupted run goes on. Results of other tasks and places are kept; each run names the processor's instructions.
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
INFIX_RATE = 0.01
PLACES = ("prompt first", "text first", "text first, infix")


def placed(recipe: Recipe, place: str) -> Recipe:
    """The recipe with its prompt at a place."""
    if place == "prompt first":
        return recipe
    words = [str(word).replace("{prompt}{text}", "{text}{prompt}") for word in recipe.tune]
    if place == "text first, infix":
        steps = 2 * int(words[words.index("--steps") + 1])
        words += ["--method", "prefix-tuning", "--steps", str(steps), "--lr", str(INFIX_RATE)]
    return dataclasses.replace(recipe, tune=tuple(words))


def measure(task: str, place: str, seed: int, limit: int) -> dict[str, Any]:
    """Tune where it is not done yet, and measure on the test set."""
    recipe = placed(RECIPES[task], place)
    folder = WORK / "text-first"
    folder.mkdir(parents=True, exist_ok=True)
    prompt = folder / f"{task}-{place.replace(',', '').replace(' ', '-')}-{seed}.safetensors"
    score = prompt.with_suffix(f".{limit}.json")
    if not prompt.exists():
        edgeprompt(*recipe.command(prompt, seed=seed))
    if not score.exists():
        (found,) = edgeprompt_json(
            *("eval", package(recipe.precision), recipe.files()[2], "--prompt", prompt),
            *("--metric", recipe.metric, "--limit", limit),
        )
        kept = {key: found[key] for key in ("metric", "value", "standard_error", "n")}
        score.write_text(json.dumps({**kept, "isa": describe()["isa"]}))
    result: dict[str, Any] = json.loads(score.read_text())
    return result


def main() -> None:
    """Tune and measure seed by seed, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("sentiment", "source"), default=["sentiment", "source"])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=[*PLACES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000, help="most held-out sentences (default: %(default)s)")
    options = parser.parse_args()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        task: {place: [] for place in options.places} for task in options.tasks
    }
    for seed in range(options.seeds):
        for task in options.tasks:
            for place in options.places:
                rows[task][place].append(measure(task, place, seed, options.limit))
                print(task, place, seed, rows[task][place][-1], flush=True)
    machine = describe()
    if RESULT.exists():
        before = json.loads(RESULT.read_text("utf-8"))["tasks"]
        rows = before | {task: before.get(task, {}) | places for task, places in rows.items()}
    RESULT.write_text(json.dumps({"machine": machine, "tasks": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"| task | {' | '.join(f'{place} (%)' for place in PLACES)} |\n|{'---|' * (len(PLACES) + 1)}")
    for task, places in rows.items():
        print(f"| {task} | {' | '.join(shown(places, place) for place in PLACES)} |")
    print(f"\n{line(machine)}")


def shown(places: dict[str, list[dict[str, Any]]], place: str) -> str:
    """Mean, each seed, and the difference from the prompt in front, seed by seed, with its standard error."""
    runs, first = places.get(place, []), places.get("prompt first", [])
    if not runs:
        return "-"
    mean = 100 * statistics.mean(one["value"] for one in runs)
    each = ", ".join(f"{100 * one['value']:.1f}" for one in runs)
    text = f"{mean:.1f} ({each})"
    apart = [100 * (one["value"] - other["value"]) for one, other in zip(runs, first, strict=False)]
    if place == "prompt first" or len(apart) < 2:
        return text
    return f"{text}; {statistics.mean(apart):+.1f} ± {statistics.stdev(apart) / math.sqrt(len(apart)):.1f}"


if __name__ == "__main__":
    main()
