"""Sentiment and source prompts of two bases, beside no prompt and beside solved examples.

    python -m benchmarks.quality.prompts [--bases smollm2 gemma3] [--tasks sentiment source] [--seeds 3] [--draws 3]
        [--limit 1000]

Prompts are tuned by the recipes of the shipped ones (`examples/prompts/make.py`) for the package that serves them: int4
of SmolLM2, whose file has 4 bits, and the file's own blocks (`gguf`) of Gemma.
Figures are accuracies on the test set, on that package. What lies under work/prompts-of-bases/ is taken from there, so
an interrupted run goes on. Results of other bases and tasks are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "prompts")]
from make import RECIPES, Recipe  # noqa: E402
from models import GEMMA3, SMOLLM2, WORK, edgeprompt, edgeprompt_json, package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "prompts.json"
BASES = {"smollm2": (SMOLLM2, "int4"), "gemma3": (GEMMA3, "gguf")}
TASKS = ("sentiment", "source")
SHOTS = 8


def recipe_of(base: str, task: str) -> Recipe:
    """The shipped prompt's recipe, for the package of a base."""
    model, precision = BASES[base]
    return dataclasses.replace(RECIPES[task], model=model, precision=precision)


def tuned(base: str, task: str, seed: int) -> Path:
    """The prompt of one seed, tuned where it is not there yet."""
    folder = WORK / "prompts-of-bases"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{base}-{task}-{seed}.safetensors"
    if not path.exists():
        edgeprompt(*recipe_of(base, task).command(path, seed=seed))
    return path


def measured(base: str, task: str, prompt: Path, limit: int, *more: object) -> list[dict[str, Any]]:
    """Accuracies of the prompt and of what it is compared with, from disk where they were measured."""
    recipe, kind = recipe_of(base, task), "-".join(str(word).strip("-") for word in more[:2] + more[4:])
    score = prompt.with_name(f"{prompt.stem}.{kind or 'alone'}.{limit}.json")
    if not score.exists():
        found = edgeprompt_json(
            *("eval", package(recipe.precision, recipe.model), recipe.files()[2], "--prompt", prompt),
            *("--metric", recipe.metric, "--limit", limit, *more),
        )
        kept = [{key: one[key] for key in ("prompt", "value", "standard_error", "n")} for one in found]
        score.write_text(json.dumps(kept), encoding="utf-8")
    result: list[dict[str, Any]] = json.loads(score.read_text(encoding="utf-8"))
    return result


def rows_of(base: str, task: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every row's accuracies: one for no prompt, one for each draw of examples, one for each seed."""
    first = tuned(base, task, 0)
    own, none = measured(base, task, first, options.limit, "--zero-shot")
    train = recipe_of(base, task).files()[0]
    draws = [
        measured(base, task, first, options.limit, "--shots", SHOTS, "--shots-from", train, "--seed", draw)[-1]
        for draw in range(options.draws)
    ]
    seeds = [own] + [
        measured(base, task, tuned(base, task, seed), options.limit)[0] for seed in range(1, options.seeds)
    ]
    return {"zero-shot": [none], f"{SHOTS} solved examples": draws, "soft prompt": seeds}


def shown(runs: list[dict[str, Any]]) -> str:
    """Mean in percent, and the spread of the runs, or the standard error of one."""
    values = [100 * one["value"] for one in runs]
    if len(values) == 1:
        return f"{values[0]:.1f} (standard error {100 * runs[0]['standard_error']:.1f})"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def to_markdown(bases: dict[str, dict[str, dict[str, list[dict[str, Any]]]]]) -> str:
    """A row for each base and task."""
    lines = list[str]()
    for base, tasks in bases.items():
        for task, rows in tasks.items():
            if not lines:
                lines = [f"| base | task | {' | '.join(rows)} | n |", "|" + " --- |" * (3 + len(rows))]
            n = rows["zero-shot"][0]["n"]
            lines.append(f"| {base} | {task} | {' | '.join(map(shown, rows.values()))} | {n} |")
    return "\n".join(lines)


def main() -> None:
    """Tune and measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=tuple(BASES), default=[*BASES])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--seeds", type=int, default=3, help="tuned prompts (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=3, help="draws of the solved examples (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="most held-out sentences (default: %(default)s)")
    options = parser.parse_args()
    found = {base: {task: rows_of(base, task, options) for task in options.tasks} for base in options.bases}
    machine = describe()
    if RESULT.exists():
        before: dict[str, Any] = json.loads(RESULT.read_text("utf-8"))["bases"]
        found = {base: before.get(base, {}) | found.get(base, {}) for base in BASES if base in before or base in found}
    RESULT.write_text(json.dumps({"machine": machine, "bases": found}, indent=1) + "\n", encoding="utf-8")
    print(f"{to_markdown(found)}\n\n{line(machine)}")


if __name__ == "__main__":
    main()
