"""Which prompt of a run is the best to keep: the best evaluated one, the last one, or the average of the last steps.

    python -m benchmarks.quality.choosing [--seeds 5] [--steps 70]

Prompt tuning with a head on all-MiniLM-L6-v2 from 240 film-review snippets, evaluation on the default share of them.
All three prompts of each run are scored on the test set, beside the one that `tune` keeps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line
from edgeprompt.evaluation.data import read_records

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import MINILM, WORK, model_file  # noqa: E402

EXAMPLES = 240


def measure(seed: int, steps: int) -> dict[str, float]:
    """Accuracy on the test set of every candidate of one run, in per cent."""
    import numpy as np
    import torch

    from edgeprompt.tuning import TuneOptions
    from edgeprompt.tuning.examples import Examples, sorted_batches
    from edgeprompt.tuning.plan import inspect_data
    from edgeprompt.tuning.prepare import prepare
    from edgeprompt.tuning.runs import make_loop, read_data

    rows = list(read_records(WORK / "data" / "movie.train.csv"))
    random.Random(seed).shuffle(rows)
    options = TuneOptions(steps=steps, seed=seed, max_length=96)
    torch.manual_seed(seed)
    run = prepare(model_file(MINILM), inspect_data(rows[:EXAMPLES], options), options)
    test = Examples(run.objective.encode(row, "a test text") for row in read_records(WORK / "data" / "movie.test.csv"))
    batches = list(sorted_batches(np.arange(len(test)), test.lengths, 64))
    found: dict[str, float] = {}

    def score(name: str) -> None:
        run.objective.model.eval()
        with torch.no_grad():
            right = sum(run.objective.measure([test[index] for index in batch]).correct for batch in batches)
        found[name] = 100 * right / len(test)

    with tempfile.TemporaryDirectory() as folder:
        loop, _ = make_loop(run, read_data(run, rows[:EXAMPLES]), Path(folder) / "p.safetensors")
        choose = loop._choose

        def candidates() -> None:
            score("last")
            for name, values in (("best", loop.progress.best_parameters), ("average", loop.progress.average)):
                if values:
                    loop._set_parameters(values)
                    score(name)
            choose()
            score("kept")

        loop._choose = candidates  # type: ignore[method-assign]
        loop.run(show=False)
    return found


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=70)
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(seed, options.steps))
        print(seed, runs[-1], flush=True)
    machine: Any = describe()
    out = ROOT / "benchmarks" / "results" / "choosing.json"
    out.write_text(json.dumps({"machine": machine, "steps": options.steps, "accuracy": runs}, indent=1) + "\n")
    print("| prompt | accuracy, mean (lowest to highest) |\n| --- | --- |")
    for name in ("last", "best", "average", "kept"):
        values = [run[name] for run in runs if name in run]
        print(f"| {name} | {statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}) |")
    print(f"\n{line(machine)}")


if __name__ == "__main__":
    main()
