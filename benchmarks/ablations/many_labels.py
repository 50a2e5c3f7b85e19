"""Classification with many labels of several tokens each: seconds a text, and memory.

    python -m benchmarks.ablations.many_labels [--precision int8] [--texts 5] [--labels 4 77 1000] [--threads 1]

The labels are made up of actions and things ("cancel the card"), so that many share beginnings, as intents do. The rows
are those of the shipped sentiment prompt: what is measured is the way to an answer, not the answer. Each number of
labels has a process of its own; memory is the peak of the process's anonymous pages over what it had when the package
and the prompt were loaded, plus the whole peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line
from edgeprompt import EngineOptions, Runtime, load_prompt
from edgeprompt.bench.memory import PeakSplit, peak_rss, split_rss
from edgeprompt.evaluation.data import read_records
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.verbalizer import word_tree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "many-labels.json"
ACTIONS = (
    "cancel", "activate", "replace", "find", "verify", "change", "close", "open", "report", "dispute", "freeze",
    "unblock", "renew", "order", "return", "track", "share", "link", "remove", "top up", "convert", "refund", "delay",
    "split", "explain", "limit", "raise", "print", "download", "confirm", "review", "schedule", "repeat", "transfer",
    "receive", "withdraw", "deposit", "insure", "upgrade", "downgrade",
)  # fmt: skip
THINGS = (
    "card", "account", "payment", "transfer", "cheque", "loan", "address", "PIN", "statement", "direct debit",
    "exchange rate", "fee", "limit", "password", "phone number", "savings plan", "standing order", "tax form",
    "virtual card", "invoice", "deposit", "mortgage", "insurance policy", "cash machine", "contactless payment",
)  # fmt: skip


def labels(count: int) -> list[str]:
    """Intents, spread over all actions."""
    every = [f"{action} the {thing}" for thing in THINGS for action in ACTIONS]
    if count > len(every):
        raise SystemExit(f"there are {len(every)} labels")
    return every[:count]


def measure(precision: str, count: int, texts: int, threads: int) -> dict[str, Any]:
    """Time and memory of one number of labels, in this process."""
    prompt = load_prompt(ROOT / "examples" / "prompts" / "sentiment.safetensors")
    words = {label: (f" {label}",) for label in labels(count)}
    prompt = dataclasses.replace(
        prompt, name="intents", verbalizer=words, calibration=(), golden=None, template=prompt.template
    )
    reader = read_records(ROOT / "examples" / "data" / "movie.train.csv")
    sentences = [str(row["text"]) for row in islice(reader, texts + 1)]
    with Runtime(
        open_package(package(precision)), EngineOptions(provider="cpu", threads=threads, reuse_texts=False)
    ) as runtime:
        runtime.add_prompt(prompt, allow_base_mismatch=True)
        before, times = split_rss().get("anonymous", 0), []
        compiled: Any = runtime._prompts.find("intents").verbalizer
        with PeakSplit() as split:
            for sentence in sentences:
                started = time.perf_counter()
                result = runtime.classify(sentence, prompt="intents")
                times.append(time.perf_counter() - started)
        assert len(result.scores) == count
    steps, level = 0, [word_tree(compiled.words)]
    while level := [child for node in level for child in node.children.values() if child.children]:
        steps += len(level)
    return {
        "labels": count,
        "tokens_of_labels": sum(map(len, compiled.words)),
        "inner_nodes_of_the_tree": steps,
        "seconds_a_text": statistics.median(times[1:]),
        "least": min(times[1:]),
        "most": max(times[1:]),
        "extra_memory_bytes": split.peak.get("anonymous", 0) - before,
        "peak_rss_bytes": peak_rss(),
    }


def main() -> None:
    """Measure in processes of their own, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--labels", type=int, nargs="+", default=[4, 77, 1000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.precision, options.alone, options.texts, options.threads)))
        return
    settings = ["--precision", options.precision, "--texts", str(options.texts), "--threads", str(options.threads)]
    rows = []
    for count in options.labels:
        command = [sys.executable, "-m", "benchmarks.ablations.many_labels", *settings, "--alone", str(count)]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    machine = describe()
    facts = {"machine": machine, "precision": options.precision, "threads": options.threads, "rows": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("| labels | tokens | s a text | extra memory (MiB) | peak of the process (MiB) |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['labels']} | {row['tokens_of_labels']} | {row['seconds_a_text']:.2f} "
            f"({row['least']:.2f} to {row['most']:.2f}) | {row['extra_memory_bytes'] >> 20} "
            f"| {row['peak_rss_bytes'] >> 20} |"
        )
    print(f"\n{line(machine)}")


if __name__ == "__main__":
    main()
