"""How fast a prompt trains: `edgeprompt.tuning` beside a plain PEFT loop, the same model, data, batch size and threads.

    python -m benchmarks.peers.tuning_speed [BASE DATA.csv] [--steps 10] [--rounds 3] [--batch-size 16] [--threads 2]

Both run in this process, alternating, and after a warm-up. The plain loop is what PEFT's examples do: `get_peft_model`,
shuffled batches padded to their longest row, logits and loss over the whole sequence with labels of -100 outside the
label word. Writes examples per second of every round to benchmarks/results/tuning-speed.json, and prints minimum,
median and maximum and the ratio of medians. Without arguments: SmolLM2 and the movie snippets in examples/data.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, line
from edgeprompt.base.load import load_base
from edgeprompt.evaluation.data import read_records
from edgeprompt.tuning.examples import BatchPlan, Examples
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.plan import inspect_data
from edgeprompt.tuning.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import model_file  # noqa: E402

SUFFIX = "\nSentiment:"


def main() -> None:
    """Measure, write the result, print it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("base", nargs="?", default=str(model_file()))
    movie = ROOT / "examples" / "data" / "movie.train.csv"
    arguments.add_argument("data", nargs="?", type=Path, default=movie, help="csv with text and label")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = list(read_records(given.data, columns=["text", "label"]))
    ways = {
        "edgeprompt": ours(given.base, rows, given.batch_size),
        "plain PEFT": plain(given.base, rows, given.batch_size),
    }
    for step in ways.values():
        step()
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, step in ways.items():
            started = time.perf_counter()
            for _ in range(given.steps):
                step()
            speeds[name].append(given.batch_size * given.steps / (time.perf_counter() - started))
    for name, found in speeds.items():
        print(f"{name:12} {min(found):7.2f} {statistics.median(found):7.2f} {max(found):7.2f} examples/s")
    ours_median, plain_median = (statistics.median(found) for found in speeds.values())
    print(f"ratio {ours_median / plain_median:.2f}")
    settings = {key: getattr(given, key) for key in ("steps", "rounds", "batch_size", "threads")}
    result = {"machine": describe(), **settings, "examples_per_second": speeds}
    out = ROOT / "benchmarks" / "results" / "tuning-speed.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(line(result["machine"]))


def ours(base: str, rows: list[Any], batch_size: int) -> Callable[[], None]:
    """One step of `edgeprompt.tuning`."""
    labels = sorted({row["label"] for row in rows})
    options = TuneOptions(
        template="{prompt}{text}" + SUFFIX,
        verbalizer={label: (f" {label}",) for label in labels},
        batch_size=batch_size,
    )
    run = prepare(load_base(base), inspect_data(rows, options), options)
    examples = Examples(run.objective.encode(row, "row") for row in rows)
    plan = BatchPlan(torch.arange(len(examples)).numpy(), examples.lengths, batch_size, seed=0)
    optimizer = torch.optim.AdamW([p for p in run.objective.model.parameters() if p.requires_grad], lr=0.03)
    done = 0

    def step() -> None:
        nonlocal done
        outcome = run.objective.measure([examples[index] for index in plan.batch(done)])
        (outcome.loss / outcome.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return step


def plain(base: str, rows: list[Any], batch_size: int) -> Callable[[], None]:
    """One step of the loop that PEFT's documentation shows."""
    from peft import PromptTuningConfig, get_peft_model

    loaded = load_base(base)
    model = get_peft_model(loaded.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16))
    encoded = []
    for row in rows:
        text = loaded.tokenizer(row["text"] + SUFFIX)["input_ids"]
        word = loaded.tokenizer(" " + row["label"], add_special_tokens=False)["input_ids"]
        encoded.append((text + word, [-100] * len(text) + word))
    random.Random(0).shuffle(encoded)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    done = 0

    def step() -> None:
        nonlocal done
        batch = [encoded[(done * batch_size + index) % len(encoded)] for index in range(batch_size)]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in batch])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in batch])
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return step


if __name__ == "__main__":
    main()
