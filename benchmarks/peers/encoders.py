"""What a prompt brings on an encoder, what int8 costs, and how fast it is beside PEFT on PyTorch.

    python -m benchmarks.peers.encoders [quality] [speed] [--seeds 5] [--rounds 5] [--out FILE]

quality: movie sentiment on all-MiniLM-L6-v2 with deep prompts (P-Tuning v2), with virtual tokens in front (prompt
tuning), each with a head, and with a head alone; the same data, steps and seeds; every prompt on the fp32 and the int8
package. Prompts that lie under work/encoders/ already are not tuned again.

speed: the first prompt of each method classifies 256 held-out snippets, here and with PEFT on PyTorch in fp32 (texts
sorted by length, the best of several batch sizes), in turn, every round in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprompt import EngineOptions, PromptFile, load, load_prompt
from edgeprompt.bench.device import describe_device

MODULE = "benchmarks.peers.encoders"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import MINILM, WORK, edgeprompt_json, model_file, package  # noqa: E402

FOLDER = WORK / "encoders"
RATES = {"p-tuning-v2": 0.01, "prompt-tuning": 0.01, "head": 0.02}
"""Learning rate of each method: the best of two or three on the dev set, with the first seed."""
STEPS = 200
PRECISIONS = ("fp32", "int8")
SNIPPETS = 256
BATCHES = (8, 16, 32, 64)
PASSES = 3
"""Times that one process classifies all snippets, after a first one that is not counted."""


@functools.cache
def base() -> Any:
    """The model that prompts are tuned on."""
    from edgeprompt.base.load import load_base

    return load_base(model_file(MINILM))


def prompt_path(method: str, seed: int) -> Path:
    """The prompt of one method and seed, tuned if it is not there yet."""
    path = FOLDER / f"{method}-{seed}.safetensors"
    if not path.exists():
        from edgeprompt.tuning import TuneOptions, tune

        options = TuneOptions(
            method=method,
            learning_rate=RATES[method],
            steps=STEPS,
            eval_steps=STEPS // 2,
            max_length=96,
            eval_data=WORK / "data" / "movie.dev.csv",
            seed=seed,
        )
        FOLDER.mkdir(parents=True, exist_ok=True)
        found = tune(base(), WORK / "data" / "movie.train.csv", output=path, options=options, progress=False)
        print(f"{path.name}: dev {found.metric} {found.value}", file=sys.stderr, flush=True)
    return path


def quality(seeds: int) -> dict[str, Any]:
    """Method -> precision -> accuracy over seeds, in percent."""
    found: dict[str, Any] = {}
    for method in RATES:
        paths = [prompt_path(method, seed) for seed in range(seeds)]
        given = [word for path in paths for word in ("--prompt", path)]
        found[method] = {"prompt_bytes": paths[0].stat().st_size, "steps": load_prompt(paths[0]).training["steps"]}
        for precision in PRECISIONS:
            rows = edgeprompt_json("eval", package(precision, MINILM), WORK / "data" / "movie.test.csv", *given)
            values = [100 * row["value"] for row in rows]
            found[method][precision] = {
                "mean": statistics.mean(values),
                "stddev": statistics.stdev(values) if len(values) > 1 else 0.0,
                "samples": values,
                "n": rows[0]["n"],
            }
    return found


def speed(rounds: int, threads: int) -> dict[str, Any]:
    """Method -> peer -> texts per second, one figure for each round, and how many labels agree with PyTorch's."""
    found: dict[str, Any] = {"threads": threads, "snippets": SNIPPETS}
    for method in ("p-tuning-v2", "prompt-tuning"):
        path = prompt_path(method, 0)
        peers: dict[str, list[dict[str, Any]]] = {peer: [] for peer in ("PEFT, PyTorch fp32", *PRECISIONS)}
        for number in range(rounds):
            order = list(peers)
            for peer in order[number % len(order) :] + order[: number % len(order)]:
                peers[peer].append(_measured(peer, path, threads))
        labels = peers["PEFT, PyTorch fp32"][0]["labels"]
        found[method] = {
            peer: {
                "texts_per_second": [SNIPPETS / one["seconds"] for one in results],
                "batch": results[0]["batch"],
                "same_label": sum(a == b for a, b in zip(labels, results[0]["labels"], strict=True)) / SNIPPETS,
            }
            for peer, results in peers.items()
        }
    return found


def _measured(peer: str, path: Path, threads: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers.encoders",
        "--threads",
        str(threads),
        "--worker",
        peer,
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(peer: str, path: Path, threads: int) -> dict[str, Any]:
    """One process's measurement: median seconds for all snippets, tokenisation included."""
    with (WORK / "data" / "movie.test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:SNIPPETS]
    if peer in PRECISIONS:
        runtime = load(package(peer, MINILM), options=EngineOptions(provider="cpu", workers=threads))
        name = runtime.add_prompt(path)
        ways: dict[int, Callable[[], list[str]]] = {
            0: lambda: [found.label for found in runtime.classify(texts, prompt=name)]
        }
    else:
        classify = peft_classifier(load_prompt(path), threads)
        ways = {size: lambda size=size: classify(texts, size) for size in BATCHES}  # type: ignore[misc]
    labels = next(iter(ways.values()))()
    best = min(ways, key=lambda size: _seconds(ways[size])) if len(ways) > 1 else 0
    return {"seconds": statistics.median(_seconds(ways[best]) for _ in range(PASSES)), "batch": best, "labels": labels}


def _seconds(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def peft_classifier(prompt: PromptFile, threads: int) -> Callable[[list[str], int], list[str]]:
    """The prompt in PEFT's own model, its head applied to the mean of the text's hidden states."""
    import torch
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    count = prompt.num_virtual_tokens
    deep = prompt.past_key_values is not None
    config = PrefixTuningConfig if deep else PromptTuningConfig
    plain = AutoModel.from_pretrained(model_file(MINILM), dtype=torch.float32)
    model = get_peft_model(plain, config(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=count)).eval()
    if prompt.past_key_values is not None:
        table = prompt.past_key_values.transpose(3, 0, 1, 2, 4).reshape(count, -1)
    else:
        assert prompt.prompt_embeddings is not None
        table = prompt.prompt_embeddings
    model.prompt_encoder["default"].embedding.weight.data = torch.from_numpy(table.copy())
    weight, bias = (torch.from_numpy(prompt.head[f"classifier.{part}"].copy()) for part in ("weight", "bias"))
    tokenizer = AutoTokenizer.from_pretrained(model_file(MINILM))

    def classify(texts: list[str], batch: int) -> list[str]:
        encoded = tokenizer(texts)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
        found = [""] * len(texts)
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            given = tokenizer.pad({"input_ids": [encoded[index] for index in chosen]}, return_tensors="pt")
            states = model(**given).last_hidden_state
            states = states if deep else states[:, count:]
            mask = given["attention_mask"][..., None].float()
            logits = (states * mask).sum(1) / mask.sum(1) @ weight.T + bias
            for index, label in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                found[index] = prompt.labels[label]
        return found

    return classify


def table(result: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = []
    if found := result.get("quality"):
        lines += ["| method | prompt file | fp32 | int8 |", "| --- | --- | --- | --- |"]
        for method, row in found.items():
            cells = [f"{row[name]['mean']:.1f} ± {row[name]['stddev']:.1f}" for name in PRECISIONS]
            lines.append(f"| {method} | {row['prompt_bytes'] / 1000:.0f} kB | {' | '.join(cells)} |")
        lines.append("")
    if found := result.get("speed"):
        lines += ["| method | peer | texts/s | times PEFT | same label |", "| --- | --- | --- | --- | --- |"]
        for method, peers in found.items():
            if not isinstance(peers, dict):
                continue
            reference = statistics.median(peers["PEFT, PyTorch fp32"]["texts_per_second"])
            for peer, row in peers.items():
                rates = row["texts_per_second"]
                shown = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
                ratio = statistics.median(rates) / reference
                lines.append(f"| {method} | {peer} | {shown} | {ratio:.2f} | {100 * row['same_label']:.1f}% |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, keep the other part of an earlier result, write it and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="quality, speed; without one: both")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "encoders.json")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "PROMPT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        peer, path = options.worker
        print(json.dumps(work(peer, Path(path), options.threads)))
        return
    parts = options.parts or ["quality", "speed"]
    if unknown := set(parts) - {"quality", "speed"}:
        parser.error(f"no part {', '.join(unknown)}; known: quality, speed")
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if "quality" in parts:
        result["quality"] = quality(options.seeds)
    if "speed" in parts:
        result["speed"] = speed(options.rounds, options.threads)
        result["device"] = describe_device()
        result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "onnxruntime")}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
