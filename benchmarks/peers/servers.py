"""`edgeprompt serve` beside llama.cpp's server: latency and tokens a second of completions of eight tasks.

    python -m benchmarks.peers.servers PACKAGE GGUF --llamacpp PYTHON [--clients 1 8 64] [--slots 8 64] [--rounds 3]

PACKAGE is exported from GGUF. Both continue the same texts by up to 12 tokens. A task is 16 virtual tokens here, and an
instruction of about as many tokens there; both servers keep what they computed of it. PYTHON is an interpreter that
has xllamacpp, which carries llama.cpp's server; it is started once for each number of slots. Every client is a thread
with one kept connection, which sends its next request when it has an answer. All servers run all the time, and are
asked in turn. Writes benchmarks/results/servers.json; `--table` prints it.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

import edgeprompt
from benchmarks.machine import describe, line

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks/results/servers.json"
WORKER = Path(__file__).with_name("workers") / "llamacpp_server.py"
PROMPT = ROOT / "examples/prompts/restore.safetensors"
TASKS, NEW_TOKENS, WARM = 8, 12, 2
INSTRUCTION = "Task {}: write this review again with capitals and full stops, like an editor.\n"
REQUESTS = 3
"""Of a client in a round; a lone one sends eight times as many."""


@dataclass(frozen=True)
class Server:
    """Where one listens, and what a request for a task is."""

    name: str
    address: str
    process: psutil.Process

    def body(self, task: int, text: str, suffix: str) -> dict[str, Any]:
        """The request."""
        if self.name == "edgeprompt":
            return {"model": f"task{task}", "prompt": text, "max_tokens": NEW_TOKENS}
        prompt = INSTRUCTION.format(task) + text + suffix
        return {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "cache_prompt": True}


@contextmanager
def started(command: list[str], name: str) -> Iterator[Server]:
    """A server that tells its address on the first line of standard output, or in the log of `edgeprompt serve`."""
    ours = name == "edgeprompt"
    quiet: Any = {"stderr": subprocess.PIPE} if ours else {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, **quiet) as process:
        told = process.stderr if ours else process.stdout
        assert told is not None
        log = threading.Thread(target=told.read, daemon=True)  # of ours, which nobody reads here
        try:
            if ours:
                address = next(json.loads(text)["url"] for text in told if '"listening"' in text)
            else:
                address = told.readline().strip()
            log.start()
            yield Server(name, urlsplit(address).netloc, psutil.Process(process.pid))
        finally:
            process.terminate()
            if log.ident:
                log.join()


def ask(server: Server, texts: list[str], suffix: str, clients: int, first: int = 0) -> dict[str, Any]:
    """Latencies in seconds, tokens and seconds of one round, with texts from number `first` on."""
    latencies: list[float] = []
    tokens: list[int] = []
    numbers, failures = count(first), []
    each = REQUESTS * (8 if clients == 1 else 1)

    def client() -> None:
        connection = http.client.HTTPConnection(server.address, timeout=300)
        try:
            for _ in range(each):
                number = next(numbers)
                text = f"{number} {texts[number % len(texts)]}"  # none comes twice: both keep what they have read
                body = json.dumps(server.body(number % TASKS, text, suffix))
                begun = time.perf_counter()
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                answer = json.loads(connection.getresponse().read())
                latencies.append(time.perf_counter() - begun)
                tokens.append(answer["usage"]["completion_tokens"])
        except Exception as error:  # told below: a round with a failure is none
            failures.append(repr(error))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit(f"{server.name}: {failures[0]}")
    return {"latencies": latencies, "tokens": sum(tokens), "seconds": time.perf_counter() - begun}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All servers in turn."""
    with (ROOT / "examples/data/movie.test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        shipped = edgeprompt.load_prompt(PROMPT)
        suffix = str(shipped.template).removeprefix("{prompt}{text}")
        rng = np.random.default_rng(0)
        assert shipped.prompt_embeddings is not None
        for task in range(TASKS):
            noise = rng.normal(0, 0.01, shipped.prompt_embeddings.shape).astype(np.float32)
            prompt = replace(shipped, name=f"task{task}", prompt_embeddings=shipped.prompt_embeddings + noise)
            edgeprompt.save_prompt(prompt, Path(scratch) / f"task{task}.safetensors")
        ours = [sys.executable, "-m", "edgeprompt", "serve", str(given.package), "--prompts", scratch, "--port", "0"]
        ours += ["--threads", str(given.threads), "--allow-other-weights", "--max-queue", "4096"]
        servers = [stack.enter_context(started(ours, "edgeprompt"))]
        for slots in given.slots:
            theirs = [str(given.llamacpp), str(WORKER), str(given.gguf), str(given.threads), str(slots)]
            servers.append(stack.enter_context(started(theirs, f"llama.cpp, {slots} slots")))
        rows: dict[str, dict[str, Any]] = {server.name: {} for server in servers}
        for server in servers:
            ask(server, texts, suffix, WARM)
        first = 0
        for number in range(given.rounds):
            for clients in given.clients:
                first += 10_000
                turn = number % len(servers)
                for server in [*servers[turn:], *servers[:turn]]:
                    found = ask(server, texts, suffix, clients, first)
                    rows[server.name].setdefault(str(clients), []).append(found)
                    rate = found["tokens"] / found["seconds"]
                    print(f"{server.name}, {clients} clients: {rate:.1f} tokens/s", flush=True)
        for server in servers:
            rows[server.name]["resident_mb"] = round(server.process.memory_info().rss / 1e6)
    return {"threads": given.threads, "machine": describe(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown: medians of the rounds, with the least and the largest of tokens a second."""
    rows = ["| server | clients | ms a request, p50 | p99 | tokens/s (least to most) | resident MB |", "|---" * 6 + "|"]
    for name, found in result["rows"].items():
        for clients, rounds in found.items():
            if clients == "resident_mb":
                continue
            times = 1000 * np.array([one["latencies"] for one in rounds])
            rates = sorted(one["tokens"] / one["seconds"] for one in rounds)
            p50, p99 = (float(np.median(np.percentile(times, p, axis=1))) for p in (50, 99))
            rate = f"{np.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
            rows.append(f"| {name} | {clients} | {p50:.0f} | {p99:.0f} | {rate} | {found['resident_mb']} |")
    return "\n".join([*rows, "", line(result["machine"])])


def main() -> None:
    """Measure and write, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", type=Path)
    parser.add_argument("gguf", nargs="?", type=Path)
    parser.add_argument("--llamacpp", type=Path, metavar="PYTHON")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--slots", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="Print what was measured.")
    given = parser.parse_args()
    if not given.table:
        if given.gguf is None or given.llamacpp is None:
            parser.error("give PACKAGE, GGUF and --llamacpp")
        OUT.write_text(json.dumps(measure(given), indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(OUT.read_text("utf-8"))))


if __name__ == "__main__":
    main()
