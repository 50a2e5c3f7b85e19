"""What running many requests and many prompts at once changes: results, throughput, memory, and the cost of a swap.

    python -m benchmarks.ablations.concurrency PART PACKAGE [--threads 2] [--out benchmarks/results/concurrency.json]

Parts, each with its own short run; a part's result replaces that part in the file and leaves the others:

    equality      200 random requests over 20 prompts from 16 threads, against each request alone
    mixed         a batch of one task against the same batch over eight tasks, alternating
    together      8 generations at once against the same 8 one after another, alternating
    thousand      1,000 prompts: memory, the cost of a swap, and a prefix after eviction

Prompts are the shipped ones, and others drawn from their rows. End tokens are ignored where tokens are counted by the
clock, so that every run generates as many.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprompt import EngineOptions, PromptFile, Request, Runtime, load_prompt, save_prompt
from edgeprompt.bench.device import clock, describe_device, throttling
from edgeprompt.bench.memory import split_rss
from edgeprompt.names import PAST_KEY_VALUES
from edgeprompt.package.folder import Package, open_package
from edgeprompt.prompts.template import Template
from edgeprompt.request import Classification, GenerationOptions

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "examples" / "prompts"
REQUESTS, PROMPTS, CLIENTS = 200, 20, 16
BATCH, TASKS, NEW_TOKENS = 16, 8, 32
ROUNDS = 15
SAMPLES = 1000


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share))


def texts(count: int, rng: random.Random) -> list[str]:
    """Real sentences of the training half."""
    with (ROOT / "examples" / "data" / "movie.train.csv").open(encoding="utf-8", newline="") as file:
        return rng.sample([row["text"] for row in csv.DictReader(file)], count)


def make_prompts(
    package: Package, count: int, *, lengths: Sequence[int] = (16,), deep: bool = False
) -> list[PromptFile]:
    """The shipped prompts of this base, then some of rows drawn from theirs; `deep`: every fifth of random KV."""
    shipped = [load_prompt(path) for path in sorted(SHIPPED.glob("*.safetensors"))]
    shipped = [prompt for prompt in shipped if prompt.base.matches(package.manifest.base)]
    if not shipped:
        raise SystemExit(f"no prompt in {SHIPPED} is for {package.manifest.base.name}")
    found = list(shipped[:count])
    pool = np.concatenate([np.asarray(prompt.prompt_embeddings) for prompt in shipped])
    size = package.manifest.geometry
    while len(found) < count:
        rng, length = np.random.default_rng(len(found)), lengths[len(found) % len(lengths)]
        like = shipped[len(found) % len(shipped)]
        rows = pool[rng.permutation(len(pool))[:length]]
        prompt = dataclasses.replace(like, name=f"p{len(found)}", prompt_embeddings=rows, golden=None)
        if deep and len(found) % 5 == 4:
            shape = (size.num_layers, 2, size.num_key_value_heads, length, size.head_size)
            past = rng.normal(0, 0.5, shape).astype(np.float32)
            prompt = dataclasses.replace(
                prompt, method="prefix-tuning", prompt_embeddings=None, past_key_values=past,
                template=Template.parse(str(prompt.template).replace("{prompt}", "")),
            )  # fmt: skip
        found.append(prompt)
    return found


def endless(package: Package) -> Package:
    """The package without end tokens."""
    tokens = dataclasses.replace(package.manifest.tokens, eos=())
    return Package(package.path, dataclasses.replace(package.manifest, tokens=tokens))


def random_request(rng: random.Random, prompts: Sequence[PromptFile], text: str) -> Request:
    """Classify or generate, greedy or sampled, with a prompt or without."""
    labelled = [prompt for prompt in prompts if prompt.verbalizer]
    if rng.random() < 0.5:
        return Request(text, rng.choice(labelled).name, task="classify")
    prompt = rng.choice([None, *prompts])
    options = GenerationOptions(
        max_new_tokens=rng.randint(1, 32), temperature=rng.choice([0.0, 0.8]), seed=rng.randint(0, 99)
    )
    return Request(text, prompt.name if prompt else None, task="generate", options=options)


def answer(result: Any) -> Any:
    """What must be the same."""
    return result.label if isinstance(result, Classification) else result.token_ids


def step_sizes(runtime: Runtime) -> list[int]:
    """A list that gets the number of rows of every decode step from now on."""
    graph: Any = runtime._engine._lanes[0].graph  # type: ignore[attr-defined]
    sizes: list[int] = []
    real = graph.decode
    graph.decode = lambda ids, lengths: (sizes.append(len(ids)), real(ids, lengths))[1]
    return sizes


def equality(package: Package, threads: int, *, batch_invariant: bool = False) -> dict[str, Any]:
    """Every result from many threads at random times against the same request alone."""
    rng = random.Random(0)
    prompts = make_prompts(package, PROMPTS, lengths=(4, 9, 16, 23), deep=True)
    options = EngineOptions(
        allow_other_weights=True,
        reuse_texts=False,
        threads=threads,
        spinning=False,
        batch_invariant=batch_invariant,
        prefix_budget=6 << 20,
    )
    with Runtime(package, options) as runtime:
        for prompt in prompts:
            runtime.add_prompt(prompt)
        requests = [random_request(rng, prompts, text) for text in texts(REQUESTS, rng)]
        alone = [runtime.run([request])[0] for request in requests]
        sizes = step_sizes(runtime)
        found: list[Any] = [None] * REQUESTS
        waits = [rng.random() * 0.2 for _ in requests]

        def client(number: int) -> None:
            for index in range(number, REQUESTS, CLIENTS):
                time.sleep(waits[index])
                found[index] = runtime.run([requests[index]])[0]

        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
    other, tokens, scores = 0, 0, 0.0
    for left, right in zip(alone, found, strict=True):
        other += answer(left) != answer(right)
        if isinstance(left, Classification):
            tokens += 1
            scores = max(scores, *(abs(left.scores[label] - right.scores[label]) for label in left.scores))
        else:
            same = next(
                (
                    at
                    for at, pair in enumerate(zip(left.token_ids, right.token_ids, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(left.token_ids), len(right.token_ids)),
            )
            tokens += min(same + 1, len(left.token_ids))
    return {
        "requests": REQUESTS,
        "prompts": PROMPTS,
        "client_threads": CLIENTS,
        "other_answers": other,
        "decisions": tokens,
        "rows_of_a_step": {"mean": statistics.mean(sizes), "max": max(sizes)},
        "near_tie_rate": other / tokens,
        "largest_score_difference": scores,
    }


def alternate(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Units per second of each run, in turn, after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        order = list(runs) if number % 2 else list(reversed(runs))
        for name in order:
            started = time.perf_counter()
            units = runs[name]()
            if number:
                rates[name].append(units / (time.perf_counter() - started))
    return rates


def ratio(rates: dict[str, list[float]], name: str, base: str) -> dict[str, Any]:
    """Rates and the median of the rounds' ratios."""
    ratios = [one / other for one, other in zip(rates[name], rates[base], strict=True)]
    return {**rates, "ratio": statistics.median(ratios), "ratios": ratios}


def mixed(package: Package, threads: int) -> dict[str, Any]:
    """A batch of one task against one of eight, for generation and for classification."""
    rng = random.Random(1)
    prompts = [prompt for prompt in make_prompts(package, 30) if prompt.verbalizer][:TASKS]
    first = prompts[0]
    # One template and verbalizer, so that only the prompt differs and the work is the same.
    tasks = [dataclasses.replace(prompt, template=first.template, verbalizer=first.verbalizer) for prompt in prompts]
    lines = texts(2 * BATCH, rng)
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    with Runtime(
        endless(package), EngineOptions(allow_other_weights=True, reuse_texts=False, threads=threads, max_batch=BATCH)
    ) as runtime:
        for task in tasks:
            runtime.add_prompt(task)

        def generate(count: int) -> int:
            runtime.run(
                [
                    Request(text, tasks[index % count].name, task="generate", options=options)
                    for index, text in enumerate(lines[:BATCH])
                ]
            )
            return BATCH * NEW_TOKENS

        def classify(count: int) -> int:
            runtime.run([Request(text, tasks[index % count].name) for index, text in enumerate(lines)])
            return len(lines)

        generation = alternate({"one_task": lambda: generate(1), "mixed": lambda: generate(TASKS)}, ROUNDS)
        labels = alternate({"one_task": lambda: classify(1), "mixed": lambda: classify(TASKS)}, ROUNDS)
    return {
        "rows": BATCH,
        "tasks": TASKS,
        "texts_to_classify": len(lines),
        "new_tokens": NEW_TOKENS,
        "generation_tokens_per_second": ratio(generation, "mixed", "one_task"),
        "classifications_per_second": ratio(labels, "mixed", "one_task"),
    }


def together(package: Package, threads: int) -> dict[str, Any]:
    """8 generations at once, submitted by 8 threads, against one after another."""
    rng = random.Random(2)
    prompts = make_prompts(package, 3)
    new = 64
    options = GenerationOptions(max_new_tokens=new)
    with Runtime(
        endless(package), EngineOptions(allow_other_weights=True, reuse_texts=False, threads=threads, max_batch=8)
    ) as runtime:
        names = [runtime.add_prompt(prompt) for prompt in prompts]
        requests = [
            Request(text, names[index % len(names)], task="generate", options=options)
            for index, text in enumerate(texts(8, rng))
        ]

        def one_after_another() -> int:
            for request in requests:
                runtime.run([request])
            return 8 * new

        def at_once() -> int:
            clients = [threading.Thread(target=runtime.run, args=([request],)) for request in requests]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            return 8 * new

        rates = alternate({"one_after_another": one_after_another, "at_once": at_once}, ROUNDS)
    return {"generations": 8, "new_tokens": new, **ratio(rates, "at_once", "one_after_another")}


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    gc.collect()
    return split_rss()["anonymous"]


def thousand(package: Package, threads: int) -> dict[str, Any]:
    """Memory of 1,000 prompts, the cost of a swap, and whether an evicted prefix comes back as it was."""
    prompts = make_prompts(package, 1000)
    weights = sum(path.stat().st_size for path in package.path.iterdir() if path.name.startswith("model.onnx"))
    found: dict[str, Any] = {"prompts": len(prompts), "model_bytes": weights}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for prompt in prompts:
            files.append(Path(folder) / f"{prompt.name}.safetensors")
            save_prompt(prompt, files[-1])
        names = [prompt.name for prompt in prompts]
        del prompts
        for title, budget in (("registered", 0), ("default_budget", None)):
            with Runtime(
                package,
                EngineOptions(allow_other_weights=True, reuse_texts=False, threads=threads, prefix_budget=budget),
            ) as runtime:
                for path in files[:3]:
                    runtime.add_prompt(path)
                runtime.run([Request("a film", name) for name in names[:3]])
                before = anonymous()
                for path in files[3:]:
                    runtime.add_prompt(path)
                extra = anonymous() - before
                found[f"extra_bytes_{title}"] = extra
                found[f"extra_share_{title}"] = extra / weights
        with Runtime(package, EngineOptions(allow_other_weights=True, reuse_texts=False, threads=threads)) as runtime:
            runtime.add_folder(folder)
            runtime.run([Request("a film", name) for name in names[:3]])
            found.update(swap(runtime, names[:3]))
            found["prefix_after_eviction_is_the_same"] = evicted(runtime, names)
    return found


def swap(runtime: Runtime, names: Sequence[str]) -> dict[str, Any]:
    """What a request pays for another prompt than the last one's, both resident.

    Directly: finding the prompt and its prefix by name, and putting its keys and values at the start of the row's
    slot, which the same prompt finds there. Beside it, whole requests in pairs.
    """
    engine: Any = runtime._engine
    graph, prompts = engine._lanes[0].graph, [runtime._prompts.find(name) for name in names[:2]]
    direct = []
    for number in range(SAMPLES + 50):
        name = names[number % 2]
        started = time.perf_counter_ns()
        prefix = engine.derived.get((runtime._prompts.find(name), PAST_KEY_VALUES))
        graph.place(0, [(name.encode(), prefix)], 64, 0)
        direct.append((time.perf_counter_ns() - started) / 1000)
    direct = sorted(direct[50:])
    assert prompts[0].num_virtual_tokens == prompts[1].num_virtual_tokens
    differences = []
    for number in range(60):
        first, second = names[number % 2], names[1 - number % 2]
        times = []
        runtime.classify("a film", prompt=first) if runtime._prompts.find(first).verbalizer else None
        for name in (second, second):
            started = time.perf_counter_ns()
            runtime.logits("a film of a kind", prompt=name)
            times.append(time.perf_counter_ns() - started)
        differences.append((times[0] - times[1]) / 1000)
    return {
        "swap_microseconds": {f"p{p}": _percentile(direct, p) for p in (50, 90, 99)} | {"max": direct[-1]},
        "swap_samples": len(direct),
        "request_difference_microseconds": {f"p{p}": _percentile(sorted(differences), p) for p in (10, 50, 90)},
        "virtual_tokens": prompts[0].num_virtual_tokens,
    }


def evicted(runtime: Runtime, names: Sequence[str]) -> bool:
    """Whether a prefix that others put out is computed again to the same bytes."""
    engine: Any = runtime._engine
    runtime.logits("a film", prompt=names[0])
    key = runtime._prompts.find(names[0]), PAST_KEY_VALUES
    before = engine.derived.get(key).copy()
    others = 2 + engine.derived.budget // before.nbytes
    for name in names[1 : 1 + others]:
        runtime.logits("a film", prompt=name)
    assert engine.derived.get(key) is None
    runtime.logits("a film", prompt=names[0])
    return bool(np.array_equal(before, engine.derived.get(key)))


PARTS: dict[str, Callable[[Package, int], dict[str, Any]]] = {
    "equality": equality,
    "equality_batch_invariant": lambda package, threads: equality(package, threads, batch_invariant=True),
    "mixed": mixed,
    "together": together,
    "thousand": thousand,
}


def main() -> None:
    """Run a part and put its result into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "concurrency.json")
    options = parser.parse_args()
    package, before = open_package(options.package), clock()
    started = time.perf_counter()
    found = PARTS[options.part](package, options.threads)
    found |= {
        "threads": options.threads,
        "seconds": round(time.perf_counter() - started, 1),
        "throttling": throttling(before, clock()),
        "device": describe_device(),
    }
    print(json.dumps({key: value for key, value in found.items() if key != "device"}, indent=1))
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    name = f"{Path(package.manifest.base.name).stem} {package.manifest.precision}"
    results.setdefault(name, {})[options.part] = found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
