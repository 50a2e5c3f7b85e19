"""Eight tasks over one text of 512 tokens, beside llama.cpp and ONNX Runtime GenAI with their caching of the same text.

    python -m benchmarks.peers.one_text [--llamacpp PYTHON] [--threads 1] [--rounds 5] [--precisions int8 int4]

All get the same ids: a text that none has seen, and behind it 16 tokens a task and "\\nAnswer:". For edgeprompt the 16
are virtual tokens that hold the embeddings of the others' 16 (`{text}{prompt}`, `run_tasks`). Peers run in turn, one at
a time. `--llamacpp` is an interpreter that has xllamacpp (benchmarks/quality/requirements-llamacpp.txt).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablations.reuse import LABELS, QUESTIONS, TASKS, TOKENS, sentences
from benchmarks.machine import describe, line
from benchmarks.peers.prepare import _build_genai, _embedding_rows, _save_hf
from edgeprompt import EngineOptions, Runtime
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.template import Template

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import WORK, model_file, package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "one-text.json"
WORKER = Path(__file__).resolve().parent / "workers" / "one_text.py"
VIRTUAL, SUFFIX = 16, "\nAnswer:"


class Ours:
    """A package, with or without reuse."""

    def __init__(self, work: dict[str, Any], precision: str, rows: list[np.ndarray], *, reuse: bool) -> None:
        opened = open_package(package(precision))
        self._texts = work["strings"]
        budget = None if reuse else 0
        options = EngineOptions(provider="cpu", threads=work["threads"], reuse_texts=reuse, prefix_budget=budget)
        self._runtime = Runtime(opened, options)
        template = Template.parse("{text}{prompt}" + SUFFIX)
        for number, own in enumerate(rows):
            words = {word.strip(): (word,) for word in LABELS[number : number + 3]}
            prompt = PromptFile(
                name=f"task{number}",
                method="prompt-tuning",
                task="classify",
                base=opened.manifest.base,
                template=template,
                prompt_embeddings=own,
                verbalizer=words,
                add_special_tokens=False,
            )
            self._runtime.add_prompt(prompt)

    def answer(self, number: int) -> dict[str, Any]:
        """Seconds for all tasks on a text."""
        started = time.perf_counter()
        found: Any = self._runtime.run_tasks(self._texts[number], [f"task{task}" for task in range(TASKS)])
        return {"seconds": time.perf_counter() - started, "tokens": [one.label for one in found.values()]}


class Peer:
    """A worker's process."""

    def __init__(self, kind: str, python: str, work: Path) -> None:
        self._process = subprocess.Popen(
            [python, WORKER, kind, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.version = self._read()["version"]

    def answer(self, number: int) -> dict[str, Any]:
        """Seconds for all tasks on a text."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            raise SystemExit(f"the worker ended: {self._process.args!r}")
        found: dict[str, Any] = json.loads(said)
        return found


def prepare(folder: Path, threads: int, rounds: int) -> tuple[Path, dict[str, Any], list[np.ndarray]]:
    """GenAI's model, the ids, and the rows of our prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    hf, genai = folder / "hf", folder / "genai-pruned"
    if not hf.exists():
        _save_hf(model_file(), hf)
    if not genai.exists():
        _build_genai(hf, genai, ("prune_lm_head=true",))
    tokenizer = open_package(package("int8")).tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    strings = [tokenizer.truncate(" ".join(sentences(60 + at)[at:]), TOKENS) for at in range(rounds + 1)]
    asked = [ids(f" {question} Say it in one word. " * 4)[:VIRTUAL] for question in QUESTIONS[:TASKS]]
    work = {"gguf": str(model_file()), "genai": str(genai), "threads": threads, "strings": strings}
    work["texts"] = [ids(text) for text in strings]
    work["tasks"] = [[*one, *ids(SUFFIX)] for one in asked]
    path = folder / "one-text.json"
    path.write_text(json.dumps(work), encoding="utf-8")
    return path, work, [_embedding_rows(hf, one) for one in asked]


def main() -> None:
    """Measure in turn, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamacpp", help="an interpreter that has xllamacpp; without it llama.cpp is left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["int8", "int4"])
    parser.add_argument("--prepare", action="store_true", help="only make what is missing")
    options = parser.parse_args()
    path, work, rows = prepare(WORK / "bench", options.threads, options.rounds)
    if options.prepare:
        return
    peers: dict[str, Any] = {}
    for precision in options.precisions:
        peers[f"edgeprompt, {precision}"] = Ours(work, precision, rows, reuse=True)
        peers[f"edgeprompt, {precision}, nothing kept"] = Ours(work, precision, rows, reuse=False)
    if options.llamacpp:
        peers["llama.cpp, Q4_1"] = Peer("llamacpp", options.llamacpp, path)
    peers["onnxruntime-genai, int4, prune_lm_head"] = Peer("genai", sys.executable, path)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    for number in range(options.rounds + 1):
        names = [*peers][number % len(peers) :] + [*peers][: number % len(peers)]
        for name in names:
            found[name].append(peers[name].answer(number))
            print(number, name, found[name][-1], flush=True)
    machine = describe()
    versions = {name: peer.version for name, peer in peers.items() if isinstance(peer, Peer)}
    runs = {name: all_[1:] for name, all_ in found.items()}  # the first text warms up
    facts = {"machine": machine, "threads": options.threads, "versions": versions, "runs": runs}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("| | seconds for 8 tasks, median (lowest to highest) |\n|---|---|")
    for name, all_ in runs.items():
        times = [one["seconds"] for one in all_]
        print(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) |")
    print(f"\n{options.threads} threads. {versions}. {line(machine)}")


if __name__ == "__main__":
    main()
