"""Fuzz what reads other people's bytes, and the scheduler: an input is answered, or refused with one of our errors.

    python -m tests.stress.fuzz PACKAGE [TARGET ...] [--inputs 10000] [--seed 0]

PACKAGE is a small decoder-only package (tests make one). Anything else than an answer or an `EdgePromptError` is a
fault: it is counted with its place, and the run goes on. Prints counts as JSON; exits 1 where a fault was found. The
test suite runs every target for a short time (tests/stress/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from edgeprompt import EdgePromptError
from tests.stress.fuzz_targets import Targets


def run(targets: Targets, name: str, inputs: int, *, number: int = 0, stop_at_fault: bool = False) -> dict[str, Any]:
    """Try one target; counts of inputs taken and refused, and the faults by their place."""
    strategy, check = targets.target(name)
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, Any] = {}
    started = time.monotonic()

    @seed(number)
    @settings(
        max_examples=inputs, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def one(value: Any) -> None:
        counts["inputs"] += 1
        try:
            counts["taken"] += check(value)
        except EdgePromptError as error:
            counts["refused"] += 1
            if "\n" in str(error):
                note(AssertionError(f"more than one line: {error}"), error, value)
        except Exception as error:
            note(error, error, value)

    def note(fault: Exception, where: Exception, value: Any) -> None:
        if stop_at_fault:
            raise fault
        counts["faulty"] += 1
        frame = traceback.extract_tb(where.__traceback__)[-1]
        place = f"{type(fault).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        faults.setdefault(place, {"error": str(fault)[:200], "input": repr(value)[:300]})

    one()
    return {**counts, "seconds": round(time.monotonic() - started, 1), "faults": faults}


def main() -> int:
    """Run targets and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    targets = Targets(options.package)
    try:
        found = {
            name: run(targets, name, options.inputs, number=options.seed) for name in options.targets or targets.names
        }
    finally:
        targets.close()
    print(json.dumps(found, indent=1))
    return int(any(result["faults"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
