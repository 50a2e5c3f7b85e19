"""What HTTP adds to a classification: the same request in turn through a server on loopback and directly.

    python -m benchmarks.ablations.serving PACKAGE PROMPT [--threads 1] [--rounds 500] [--out FILE]

The server is a process of its own (`edgeprompt serve`), asked over one kept connection; the direct answers come from a
runtime in this process. Both take the same texts in turns, so that a busy machine slows both. Written are the
percentiles of both, and of the difference of each pair. The load average says how quiet the machine was.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import edgeprompt
from edgeprompt import EngineOptions
from edgeprompt.bench.device import clock, describe_device, throttling

ROOT = Path(__file__).resolve().parents[2]
WARM = 20


@contextmanager
def server(package: Path, prompts: Path, threads: int) -> Iterator[http.client.HTTPConnection]:
    """A connection to `edgeprompt serve`."""
    command = [sys.executable, "-m", "edgeprompt", "serve", str(package), "--prompts", str(prompts), "--port", "0"]
    process = subprocess.Popen([*command, "--threads", str(threads)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(json.loads(line)["url"] for line in process.stderr if '"listening"' in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # the log, which nobody reads here
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        yield connection
        connection.close()
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(connection: http.client.HTTPConnection, prompt: str, text: str) -> dict[str, Any]:
    """The label and scores of one text, over HTTP."""
    body = json.dumps({"model": prompt, "input": text})
    connection.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found: dict[str, Any] = json.loads(answer.read())["data"][0]
    return found


def measure(package: Path, prompt: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Both ways in turn; milliseconds."""
    with (ROOT / "examples" / "data" / "movie.train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    options = EngineOptions(threads=threads)
    direct, over = [], []
    with (
        edgeprompt.load(package, options=options, prompts=[prompt]) as runtime,
        server(package, prompt.parent, threads) as connection,
    ):
        (name,) = [one for one in runtime.prompts if one not in runtime.manifest.prompts][:1]
        for number in range(rounds + WARM):
            text = texts[number % len(texts)]
            started = time.perf_counter()
            expected = runtime.classify(text, prompt=name)
            between = time.perf_counter()
            found = ask(connection, prompt.stem, text)
            ended = time.perf_counter()
            assert found["scores"] == dict(expected.scores), (found, expected)
            if number >= WARM:
                direct.append(1000 * (between - started))
                over.append(1000 * (ended - between))
    pairs = [http - alone for http, alone in zip(over, direct, strict=True)]
    return {
        name: {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (10, 50, 95)}
        for name, times in (("direct_ms", direct), ("http_ms", over), ("difference_ms", pairs))
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("prompt", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serving.json")
    options = parser.parse_args()
    before, load = clock(), os.getloadavg()[0]
    found = measure(options.package, options.prompt, options.threads, options.rounds)
    found |= {
        "threads": options.threads,
        "rounds": options.rounds,
        "load_average_before": load,
        "throttling": throttling(before, clock()),
        "device": describe_device(),
    }
    print(json.dumps({key: value for key, value in found.items() if key != "device"}, indent=1))
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    manifest = edgeprompt.load(options.package).manifest
    results[f"{Path(manifest.base.name).stem} {manifest.precision}"] = found
    options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
