"""Decoding beside programs that keep cores busy: all threads, one thread, and the number that is chosen at work.

    python -m benchmarks.ablations.busy PACKAGE [PACKAGE ...] [--gguf FILE --llamacpp PYTHON] [--rounds 5] [--seconds 8]

A busy program is a process that counts. Each runtime decodes without end in a process of its own, on all cores, on one
thread, and as `threads=None` has it; with `--llamacpp` llama.cpp does the same with the GGUF file of the last package,
on all cores and on one. In every round each of them counts its tokens for some seconds on a quiet machine and beside
one busy program, one runtime after the other; those that wait sleep. The first seconds of each turn are not counted,
since they are what it takes to find out. The table has tokens a second, and the ratio to the better of all threads and
one thread in the same round: median, lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "busy.json"
ALL, ONE, CHOSEN = "all threads", "one thread", "the number that is chosen"
TEXT = "The harbour of the small town was quiet that morning, and"


def answer(tokens: Callable[[], Iterator[Any]]) -> None:
    """Decode without end; on each line that is read, count tokens for so many seconds and print how many.

    Args:
        tokens: begins a text anew, and gives something for each token.
    """
    print("ready", flush=True)
    for asked in sys.stdin:
        before, seconds = map(float, asked.split())
        start = time.perf_counter() + before
        count, end = 0, start + seconds
        while time.perf_counter() < end:
            for _ in tokens():
                now = time.perf_counter()
                count += start <= now < end
                if now >= end:
                    break
        print(count / seconds, flush=True)


def decode(package: str, threads: int | None, cache: str) -> None:
    """Answer with edgeprompt."""
    import edgeprompt

    options = edgeprompt.EngineOptions(
        provider="cpu", threads=threads, cache_folder=cache, allow_other_weights=True, reuse_texts=False
    )
    with edgeprompt.load(package, options=options) as runtime:
        answer(lambda: runtime.stream(TEXT, max_new_tokens=128, temperature=1.0, seed=1))


def decode_with_llamacpp(gguf: str, threads: int) -> None:
    """Answer with llama.cpp, by its Python package's own steps."""
    import llama_cpp

    model = llama_cpp.Llama(gguf, n_threads=threads, n_threads_batch=threads, n_ctx=512, verbose=False)

    def tokens() -> Iterator[int]:
        model.reset()
        model.eval(model.tokenize(TEXT.encode()))
        for _ in range(128):
            token = model.sample(temp=0.0)
            model.eval([token])
            yield token

    answer(tokens)


class Runner:
    """A process that decodes when it is asked to."""

    def __init__(self, python: Path | str, *words: object) -> None:
        self.process = subprocess.Popen(
            [str(python), *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{words}: does not start")

    def rate(self, before: float, seconds: float) -> float:
        """Tokens a second."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{before} {seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def measure(runners: dict[str, Runner], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """ "quiet" and "one busy core" -> runner -> tokens a second of every round."""
    found: dict[str, dict[str, list[float]]] = {}
    order = list(runners)
    for _ in range(options.rounds):
        for state in ("quiet", "one busy core"):
            busy = None
            if state != "quiet":
                busy = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"])
            try:
                for name in order:
                    rate = runners[name].rate(options.before, options.seconds)
                    found.setdefault(state, {}).setdefault(name, []).append(rate)
                    print(f"{state}: {name}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
            finally:
                if busy is not None:
                    busy.send_signal(signal.SIGKILL)
                    busy.wait()
        order = [*order[1:], order[0]]
    return found


def main() -> None:
    """Measure, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llamacpp", type=Path, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--before", type=float, default=4.0, help="seconds that are not counted")
    parser.add_argument("--cache", type=Path, default=Path("work/busy-cache"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    from benchmarks.machine import describe  # not in llama.cpp's environment, which runs this file too

    cores = len(os.sched_getaffinity(0))
    facts: dict[str, Any] = {"machine": describe(), "cores": cores, "seconds": options.seconds, "packages": {}}
    for package in options.packages:
        here = Path(__file__).resolve()
        runners = {
            name: Runner(sys.executable, here, "--decode", package, threads, options.cache)
            for name, threads in ((ALL, cores), (ONE, 1), (CHOSEN, 0))
        }
        if options.llamacpp is not None and package == options.packages[-1]:
            for name, threads in (("llama.cpp, all threads", cores), ("llama.cpp, one thread", 1)):
                runners[name] = Runner(options.llamacpp, here, "--llama", options.gguf, threads)
        try:
            facts["packages"][f"{package.parent.name}/{package.name}"] = measure(runners, options)
        finally:
            for runner in runners.values():
                runner.process.kill()
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(facts))


def to_markdown(facts: dict[str, Any]) -> str:
    """The table."""
    from benchmarks.machine import line

    lines = [
        "| package | machine | runtime | tokens/s | to the better of all and one |",
        "| --- | --- | --- | --- | --- |",
    ]
    for package, states in facts["packages"].items():
        for state, runners in states.items():
            best = [max(pair) for pair in zip(runners[ALL], runners[ONE], strict=True)]
            for name, rates in runners.items():
                ratios = [rate / most for rate, most in zip(rates, best, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                lines.append(f"| {package} | {state} | {name} | {statistics.median(rates):.1f} | {spread} |")
    return "\n".join([*lines, "", line(facts["machine"])])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--decode"]:
        decode(sys.argv[2], int(sys.argv[3]) or None, sys.argv[4])
    elif sys.argv[1:2] == ["--llama"]:
        decode_with_llamacpp(sys.argv[2], int(sys.argv[3]))
    else:
        main()
