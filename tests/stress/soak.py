"""Soak the runtime: random requests from many threads with adds, removals, cancellations and injected failures.

    python tests/stress/soak.py PACKAGE [--requests 20000] [--threads 8] [--seconds 1800]

Every generation and classification is compared with the answer of the same request run alone before the soak. Failures
are injected into prefills and into decode steps, and files of the prefix cache on disk are damaged while they are used.
Prints counts as JSON, with resident memory at the quarter marks, and exits 1 if anything was lost, wrong, or failed
without an injected cause, or if memory grew by more than a twentieth over the second half.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import edgeprompt
from edgeprompt import (
    EngineOptions,
    Generation,
    PromptFile,
    Request,
    RequestCancelledError,
    RequestTimeoutError,
    Runtime,
)
from edgeprompt.prompts.template import Template
from edgeprompt.request import GenerationOptions

WORDS = ["the", "a", "film", "was", "good", "bad", "very", "story", "actors", "music", "long", "short", "never", "made"]
SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""When memory is read, as shares of the soak."""
NO_ENDS = ("asked", "prompts added and removed", "cache files damaged")
"""Counts that are not the end of a request."""
LONG = GenerationOptions(max_new_tokens=60, temperature=9.0, seed=1)
SHORT = GenerationOptions(max_new_tokens=8, choices=("a good film", "a bad film"))
INJECTED_TOKEN = 77
"""A text id that makes a prefill fail; no tokenised text here holds it."""
INJECTED_LENGTH = 220
"""A row of that many positions makes every decode step that it takes part in fail; no other request here is as long."""


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
    return result.token_ids if isinstance(result, Generation) else (result.label, list(result.logits.values()))


def same(found: Any, expected: Any) -> bool:
    """Whether two answers are one: tokens exactly; a label exactly and its logits to 1e-3."""
    if found and isinstance(found[-1], list):
        close = (math.isclose(a, b, abs_tol=1e-3) for a, b in zip(found[1], expected[1], strict=True))
        return found[0] == expected[0] and all(close)
    return bool(found == expected)


def break_graph(runtime: Runtime) -> None:
    """Make prefills with the injected token, and decode steps with a row of the injected length, fail."""
    graph = runtime._engine._lanes[0].graph  # type: ignore[attr-defined]

    def failing(real: Any, is_injected: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if is_injected(*arguments):
                raise RuntimeError("injected")
            return real(*arguments)

        return call

    graph.prefill = failing(graph.prefill, lambda row, ids, *rest: INJECTED_TOKEN in ids)
    graph.decode = failing(graph.decode, lambda ids, lengths: INJECTED_LENGTH in lengths)
    graph.decode_one = failing(graph.decode_one, lambda row, token, length: length == INJECTED_LENGTH)


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
                late = rng.random() < 0.5
                ids = [5] * INJECTED_LENGTH if late else [5, INJECTED_TOKEN, 6]
                runtime.run([Request(input_ids=ids, task="generate", options=SHORT)])
                tally.add("WRONG: an injected failure vanished")
            elif fate < 0.1:
                runtime.run(
                    [Request(request.text, request.prompt, task=request.task, options=request.options, timeout=1e-6)]
                )
                tally.add("finished before the timeout")
            elif fate < 0.13:
                pieces = runtime.stream(request.text, options=LONG)
                next(pieces, None)
                del pieces
                tally.add("stream dropped")
            else:
                found = answer_of(runtime.run([request])[0])
                tally.add("right" if same(found, expected) else "WRONG: another answer than alone")
        except RequestCancelledError:
            tally.add("cancelled")
        except RequestTimeoutError:
            tally.add("timed out")
        except RuntimeError as error:
            tally.add("failure injected" if str(error) == "injected" else f"WRONG: {error!r}")
        except Exception as error:
            tally.add(f"WRONG: {error!r}")


def damage(folder: Path, rng: random.Random) -> None:
    """Cut a file of the prefix cache, or flip a bit of it."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    broken = path.with_suffix(".broken")  # renamed into place: cutting a file that is mapped would kill the reader
    broken.write_bytes(data)
    broken.replace(path)


def churn(runtime: Runtime, tally: Tally, stop: Any, cache: Path) -> None:
    """Add, ask and remove prompts of its own, and damage the prefix cache."""
    number, rng = 0, random.Random(0)
    while not stop():
        name = f"churn{number % 7}"
        runtime.add_prompt(random_prompt(runtime, name, number % 50), name=name)
        runtime.classify("a film", prompt=name)
        runtime.remove_prompt(name)
        tally.add("prompts added and removed")
        number += 1
        if number % 5 == 0:
            damage(cache, rng)
            tally.add("cache files damaged")
        time.sleep(0.01)


def main() -> int:
    """Run the soak; the exit code says whether it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--intra-op-threads", type=int)
    parser.add_argument(
        "--prefix-budget", type=int, default=40_000, help="bytes; small, so that prefixes are put out (default 40000)"
    )
    options = parser.parse_args()
    logging.getLogger("edgeprompt").addHandler(logging.NullHandler())  # it says of each damaged file that it is
    with (
        tempfile.TemporaryDirectory() as cache,
        edgeprompt.load(
            options.package,
            options=EngineOptions(
                provider="cpu",
                threads=options.intra_op_threads,
                spinning=False,
                prefix_budget=options.prefix_budget,
                batch_invariant=True,
                cache_folder=Path(cache),
            ),
        ) as runtime,
    ):
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
        threads.append(threading.Thread(target=churn, args=(runtime, tally, stop, Path(cache))))
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
    ended = sum(
        count
        for what, count in counts.items()
        if what not in ("asked", "prompts added and removed", "cache files damaged")
    )
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
