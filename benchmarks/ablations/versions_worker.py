"""One measurement of `versions.py`, through what every version's public API has: PACKAGE PROMPT THREADS.

It prints where edgeprompt was imported from as soon as there is a first label, then JSON: seconds of each measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import edgeprompt

TEXT = (
    "the film begins slowly, but its last hour is as moving as anything that was shown this year, and nobody left early"
)
TEXTS = [" ".join(TEXT.split()[: 8 + number % 14]) for number in range(64)]
TOKENS = 33


def timed(call: Callable[[], object], count: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Load, classify, generate where the package can."""
    package, prompt, threads = sys.argv[1:]
    with edgeprompt.load(package, provider="cpu", threads=int(threads), prompts=[prompt]) as runtime:
        (name,) = runtime.prompts
        runtime.classify(TEXT, prompt=name)
        print(edgeprompt.__file__, flush=True)
        found = {
            "classify": timed(lambda: runtime.classify(TEXT, prompt=name), 25),
            "classify_many": timed(lambda: runtime.classify(TEXTS, prompt=name), 3),
        }
        if runtime.manifest.architecture == "decoder-only":
            found["first_token"] = timed(lambda: runtime.generate(TEXT, prompt=None, max_new_tokens=1), 15)
            whole = timed(lambda: runtime.generate(TEXT, prompt=None, max_new_tokens=TOKENS), 7)
            length = len(runtime.generate(TEXT, prompt=None, max_new_tokens=TOKENS).token_ids)
            if length > 1:
                found["decode"] = (whole - found["first_token"]) / (length - 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
