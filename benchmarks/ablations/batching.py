"""What a prefill of several short sequences in one pass would gain: milliseconds a token, alone and together.

    python -m benchmarks.ablations.batching [--precisions int8 int4 fp32] [--threads 1] [--rounds 6]

Packages of SmolLM2, straight on ONNX Runtime, with caches in place as the runtime has them. GroupQueryAttention takes
several sequences of more than one token only where no keys and values stand before them, so a batch reads the 16
virtual tokens of its prompt again. One sequence of the same number of tokens is what packing into one row would be
without a mask: the kernels' own gain from more rows.

    alone       one sequence of 8 to 384 tokens behind 16 that are there: a request's prefill today
    together    1 to 8 sequences of 40 and 56 (40 behind 16 read again) tokens, nothing before them
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe, line
from edgeprompt import names
from edgeprompt.ort.session import graph_inputs, open_session
from edgeprompt.package.folder import open_package

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "batching.json"
PROMPT, LENGTH = 16, 1024
ALONE = (8, 16, 24, 32, 40, 56, 64, 96, 128, 192, 256, 384)
TOGETHER = tuple((rows, tokens) for tokens in (40, 56) for rows in (1, 2, 4, 8))


def runner(session: Any, manifest: Any, rows: int, tokens: int, past: int) -> Callable[[], None]:
    """A call that prefills `rows` sequences of `tokens` behind `past` positions."""
    size, rng = manifest.geometry, np.random.default_rng(0)
    shape = (2 * size.num_layers, rows, size.num_key_value_heads, LENGTH, size.head_size)
    cache = (rng.normal(size=shape) / 10).astype(np.float32)
    small = {
        names.INPUT_IDS: rng.integers(5, 4000, (rows, tokens)),
        names.ATTENTION_MASK: np.ones((rows, past + tokens), np.int64),
        names.POSITION_IDS: np.tile(np.arange(past, past + tokens), (rows, 1)),
        names.PROMPT_EMBEDDINGS: np.zeros((1, size.hidden_size), np.float32),
    }
    logits = np.empty((rows, 1, size.vocab_size), np.float32)
    binding = session.io_binding()
    known = {value.name for value in graph_inputs(session)}
    arrays = {name: array for name, array in small.items() if name in known}
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for layer in range(size.num_layers):
        for part, block in (("key", cache[2 * layer]), ("value", cache[2 * layer + 1])):
            place = ("cpu", 0, np.float32, block.shape, block.ctypes.data)
            binding.bind_input(names.past(layer, part), *place)
            binding.bind_output(names.present(layer, part), *place)
    binding.bind_output(names.LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def run(_: Any = (cache, arrays, logits)) -> None:  # what is bound must live
        session.run_with_iobinding(binding)

    return run


def measure(precision: str, threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds a token of every shape, in turn."""
    opened = open_package(package(precision))
    session = open_session(opened.graph("model"), provider="cpu", threads=threads).ort
    runs = {f"1 x {tokens} behind {PROMPT}": (1, tokens, PROMPT) for tokens in ALONE}
    runs |= {f"{rows} x {tokens}": (rows, tokens, 0) for rows, tokens in TOGETHER}
    ready = {name: runner(session, opened.manifest, *shape) for name, shape in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds + 1):
        for name, run in ready.items():
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(times[name][1:]) / (rows * tokens) for name, (rows, tokens, _) in runs.items()}


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["int8", "int4", "fp32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    machine = describe()
    found = {name: measure(name, options.threads, options.rounds) for name in options.precisions}
    facts = {"machine": machine, "threads": options.threads, "ms_per_token": found}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"| ms a token | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for shape in next(iter(found.values())):
        print(f"| {shape} | {' | '.join(f'{times[shape]:.2f}' for times in found.values())} |")
    print(f"\n{options.threads} threads. {line(machine)}")


if __name__ == "__main__":
    main()
