"""Soak the runtime: random requests from many threads with adds, removals, cancellations and injected failures.

    python benchmarks/soak.py PACKAGE [--requests 20000] [--threads 8] [--seconds 1800]

Every generation and classification is compared with the answer of the same request run alone before the soak. Prints
counts as JSON, with resident memory at the quarter marks, and exits 1 if anything was lost, wrong, or failed without
an injected cause, or if memory grew by more than a twentieth over the second half.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import edgeprompt
from edgeprompt import EngineOptions, PromptFile, Request, RequestCancelledError, RequestTimeoutError, Runtime
from edgeprompt.request import GenerationOptions
from edgeprompt.template import Template

WORDS = ["the", "a", "film", "was", "good", "bad", "very", "story", "actors", "music", "long", "short", "never", "made"]
SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""When memory is read, as shares of the soak."""
LONG = GenerationOptions(max_new_tokens=60, temperature=9.0, seed=1)
INJECTED_TOKEN = 77
"""A text id that makes the injected fault of `break_graph` fire; no tokenised text here holds it."""


def random_prompt(runtime: Runtime, name: str, seed: int) -> PromptFile:
    """A prompt of random rows or of random keys and values."""
    rng, size, count = np.random.default_rng(seed), runtime.manifest.geometry, 4 + seed % 9
    deep = seed % 4 == 3
    shape = (size.num_layers, 2, size.num_key_value_heads, count, size.head_size)
    return PromptFile(
        name=name,
        method="prefix-tuning" if deep else "prompt-tuning",
        task="classify",
        base=runtime.manifest.base,
        template=Template.parse("{prompt}{text}\nA:"),
        prompt_embeddings=None if deep else rng.normal(0, 0.1, (count, size.hidden_size)).astype(np.float32),
        past_key_values=rng.normal(0, 0.5, shape).astype(np.float32) if deep else None,
        verbalizer={"x": (" good", " very good"), "y": (" bad",)},
    )


def random_request(rng: random.Random, prompts: list[str]) -> Request:
    """A request that ends in at most 24 steps."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
    if rng.random() < 0.5:
        return Request(text, rng.choice(prompts), task="classify")
    options = GenerationOptions(
        max_new_tokens=rng.randint(1, 24), temperature=rng.choice([0.0, 0.8]), seed=rng.randint(0, 99)
    )
    return Request(text, rng.choice([None, *prompts]), task="generate", options=options)


def answer_of(result: Any) -> Any:
    """What must not change."""
    return (
        result.token_ids
        if hasattr(result, "token_ids")
        else (result.label, [round(v, 3) for v in result.logits.values()])
    )


def break_graph(runtime: Runtime) -> None:
    """Make every prefill that holds the injected token fail inside the graph's call."""
    graph = runtime._engine._scheduler._graph  # type: ignore[attr-defined]
    real = graph.prefill

    def prefill(row: int, ids: Any, *rest: Any) -> Any:
        if INJECTED_TOKEN in ids:
            raise RuntimeError("injected")
        return real(row, ids, *rest)

    graph.prefill = prefill


def resident_mb() -> float:
    """Anonymous resident memory of this process in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the soak reads /proc/self/status, so it needs Linux")


@dataclass
class Tally:
    """What happened."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        """Count one."""
        with self.lock:
            self.counts[what] += 1


def client(runtime: Runtime, pool: list[tuple[Request, Any]], tally: Tally, seed: int, stop: Any) -> None:
    """Ask until `stop()`."""
    rng = random.Random(seed)
    while not stop():
        request, expected = rng.choice(pool)
        fate = rng.random()
        tally.add("asked")
        try:
            if fate < 0.05:
                job = runtime.submit(Request(request.text, task="generate", options=LONG))
                time.sleep(rng.random() * 0.01)
                job.cancel()
                job.result(60)
                tally.add("finished before the cancellation")
            elif fate < 0.08:
                runtime.run([Request(input_ids=[5, INJECTED_TOKEN, 6], task="generate")])
                tally.add("WRONG: an injected failure vanished")
            elif fate < 0.1:
                runtime.run(
                    [Request(request.text, request.prompt, task=request.task, options=request.options, timeout=1e-6)]
                )
                tally.add("finished before the timeout")
            else:
                found = answer_of(runtime.run([request])[0])
                tally.add("right" if found == expected else "WRONG: another answer than alone")
        except RequestCancelledError:
            tally.add("cancelled")
        except RequestTimeoutError:
            tally.add("timed out")
        except RuntimeError as error:
            tally.add("injected failure" if str(error) == "injected" else f"WRONG: {error!r}")
        except Exception as error:
            tally.add(f"WRONG: {error!r}")


def churn(runtime: Runtime, tally: Tally, stop: Any) -> None:
    """Add, ask and remove prompts of its own."""
    number = 0
    while not stop():
        name = f"churn{number % 7}"
        runtime.add_prompt(random_prompt(runtime, name, number % 50), name=name)
        runtime.classify("a film", prompt=name)
        runtime.remove_prompt(name)
        tally.add("prompts added and removed")
        number += 1
        time.sleep(0.01)


def main() -> int:
    """Run the soak; the exit code says whether it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1800)
    options = parser.parse_args()
    engine = EngineOptions(provider="cpu", spinning=False, prefix_budget=4 << 20, batch_invariant=True)
    with edgeprompt.load(options.package, options=engine) as runtime:
        names = [runtime.add_prompt(random_prompt(runtime, f"p{index}", index)) for index in range(20)]
        rng = random.Random(0)
        pool = [
            (request, answer_of(runtime.run([request])[0]))
            for request in (random_request(rng, names) for _ in range(200))
        ]
        break_graph(runtime)
        tally, started, memory = Tally(), time.monotonic(), []

        def stop() -> bool:
            return tally.counts["asked"] >= options.requests or time.monotonic() - started > options.seconds

        threads = [
            threading.Thread(target=client, args=(runtime, pool, tally, seed, stop)) for seed in range(options.threads)
        ]
        threads.append(threading.Thread(target=churn, args=(runtime, tally, stop)))
        for thread in threads:
            thread.start()
        for share in SHARES:
            asked, seconds = share * options.requests, share * options.seconds
            while not stop() and tally.counts["asked"] < asked and time.monotonic() - started < seconds:
                time.sleep(0.05)
            memory.append(round(resident_mb(), 1))
        for thread in threads:
            thread.join(120)
        hanging = sum(thread.is_alive() for thread in threads)
    counts = dict(sorted(tally.counts.items()))
    ended = sum(count for what, count in counts.items() if what not in ("asked", "prompts added and removed"))
    wrong = {what: count for what, count in counts.items() if what.startswith("WRONG")}
    grown = memory[-1] / memory[2] - 1
    report = {
        **counts,
        "lost": counts["asked"] - ended,
        "hanging threads": hanging,
        "anonymous MB": dict(zip(map(str, SHARES), memory, strict=True)),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(report, indent=1))
    return int(bool(wrong or hanging or counts["asked"] != ended or grown > 0.05))


if __name__ == "__main__":
    sys.exit(main())
