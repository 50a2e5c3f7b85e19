"""Whether a sentiment prompt keeps its accuracy on the int4 package.

    python -m benchmarks.accuracy [--seeds 3] [--out benchmarks/results/accuracy.json]

Tunes the shipped sentiment recipe with several seeds, for the int4 package; evaluates every prompt on the fp32 and the
int4 package and on all four test sets, beside zero-shot. Prompts and scores that exist under work/ already are taken
from there, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from edgeprompt import load_prompt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "prompts")]
from make import RECIPES  # noqa: E402
from models import WORK, edgeprompt, edgeprompt_json, package  # noqa: E402

SETS = ("movie", "product", "tweets", "news")
RECIPE = RECIPES["sentiment"]
SERVED = ("int4", "fp32")
LIMIT = 100
"""Sentences of each test set; the standard error of one accuracy is about 4 points, but both packages see the same."""
FOLDER = WORK / "accuracy"


def prompt(seed: int) -> Path:
    """The prompt of one seed, tuned if it is not there yet."""
    path = FOLDER / f"{seed}.safetensors"
    if not path.exists():
        edgeprompt(*RECIPE.command(path, seed=seed), "--log", FOLDER / f"{seed}.log")
    return path


def scores(served: str, seed: int) -> dict[str, dict[str, float]]:
    """Test set -> accuracy with the prompt ("tuned"), and for the first seed zero-shot."""
    path = FOLDER / f"{served}-{seed}.json"
    if not path.exists():
        found = {}
        zero = ("--zero-shot",) if seed == 0 else ()
        for name in SETS:
            test = WORK / "data" / f"{name}.test.csv"
            rows = edgeprompt_json(*("eval", package(served), test, "--prompt", prompt(seed), "--limit", LIMIT, *zero))
            found[name] = {"zero-shot" if row["prompt"] == "zero-shot" else "tuned": row["value"] for row in rows}
        path.write_text(json.dumps(found))
    loaded: dict[str, dict[str, float]] = json.loads(path.read_text())
    return loaded


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and spread over seeds, in per cent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": 100 * statistics.mean(values), "stddev": 100 * spread, "samples": values}


def main() -> None:
    """Run what is missing, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for served in SERVED:
        rows = [scores(served, seed) for seed in range(options.seeds)]
        result[f"zero-shot, {served}"] = {name: summary([rows[0][name]["zero-shot"]]) for name in SETS}
        result[f"soft prompt, {served}"] = {name: summary([row[name]["tuned"] for row in rows]) for name in SETS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    steps = [load_prompt(prompt(seed)).training["steps"] for seed in range(options.seeds)]
    facts = {"steps": steps, "sentences_of_each_set": LIMIT}
    options.out.write_text(json.dumps({**facts, "accuracy": result}, indent=1) + "\n")
    print(f"| prompt | {' | '.join(SETS)} | mean |\n|---|" + "---|" * (len(SETS) + 1))
    for row, sets in result.items():
        cells = [f"{sets[name]['mean']:.1f} ± {sets[name]['stddev']:.1f}" for name in SETS]
        print(f"| {row} | {' | '.join(cells)} | {statistics.mean(sets[name]['mean'] for name in SETS):.1f} |")


if __name__ == "__main__":
    main()
