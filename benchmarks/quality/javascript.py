"""Whether Node.js and a browser answer as Python does, on held-out texts and on every kind of package.

    python -m benchmarks.quality.javascript [--texts 400] [--packages int4,web,...] [--table]
    python -m benchmarks.quality.javascript --browser | --kv | --accuracy

For each package both runtimes label the same texts (half by either of two tasks, some by words of several tokens),
generate greedily and with seeds, tag, and answer questions, on one thread each. The shipped prompts are asked; for
tags, answers and words of several tokens, the shipped rows with a random head or with other words. `--browser` asks the
web package in headless Chromium. Matrix products of 8-bit integers are exact, but the float sums around them have
another order there, so the measure is how far Python is from itself when a prompt's values change by 1e-6 of their
size. `--kv` gives prompts as keys and values to transformers.js. `--accuracy` counts right labels of the int8 and the
web package. Writes benchmarks/results/javascript.json; what
is not measured again stays; `--table` prints it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import edgeprompt
from benchmarks.machine import describe, line
from edgeprompt import EngineOptions, PromptFile, Request, Runtime, load_prompt, save_prompt
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.template import Template
from exporters.convert import convert_prompt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import MINILM, SMOLLM2, WORK, package  # noqa: E402

OUT = ROOT / "benchmarks/results/javascript.json"
PROMPTS = ROOT / "examples/prompts"
PACKAGES = ("int4", "int4-128", "int8", "web", "minilm-int8", "minilm-web")
OPTIONS = EngineOptions(provider="cpu", threads=1, allow_other_weights=True)
LONG_WORDS = {
    "praise": (" a warm recommendation", " praised without reserve"),
    "blame": (" a stern warning", " blamed without mercy"),
    "neither": (" neither praised nor blamed",),
}
GENERATIONS, SEEDED, LOCATED, WORDS = 50, 20, 40, 50
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
QUESTION = "What is this about?"
KV_TOKENS = 24
CHANGES = 3
"""How many times a prompt is changed by 1e-6."""


def texts(name: str) -> list[tuple[str, str]]:
    """Held-out texts with their labels (or targets)."""
    with (WORK / f"data/{name}.test.csv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row.get("label") or row["target"]) for row in csv.DictReader(file)]


def labelled(count: int) -> dict[str, list[str]]:
    """Half of the texts for either task."""
    sets = {"sentiment": "movie", "source": "source"}
    return {task: [text for text, _ in texts(data)[: count // 2]] for task, data in sets.items()}


def folder_of(name: str) -> Path:
    """The package, exported if it is not there yet."""
    model, _, precision = name.partition("-") if name.startswith("minilm-") else ("smollm2", "", name)
    return package(precision, MINILM if model == "minilm" else SMOLLM2)


def prompts_of(runtime: Runtime, name: str, folder: Path) -> dict[str, Path]:
    """Prompt name -> file: the shipped ones, and what is made of them."""
    stem = "minilm-" if name.startswith("minilm-") else ""
    found = {task: PROMPTS / f"{stem}{task}.safetensors" for task in ("sentiment", "source")}
    shipped = load_prompt(found["sentiment"])
    pair = Template.parse("{question}{context}" if stem else "{prompt}{question}\n{context}")
    made = [_headed(runtime, shipped, "tags", "tag", shipped.template, ("O", "B-A", "I-A", "B-C"))]
    made.append(_headed(runtime, shipped, "answers", "qa", pair, ("start", "end")))
    if not stem:
        found["restore"] = PROMPTS / "restore.safetensors"
        made.append(dataclasses.replace(shipped, name="words", verbalizer=LONG_WORDS, golden=None, calibration=()))
    for prompt in made:
        found[prompt.name] = folder / f"{prompt.name}.safetensors"
        save_prompt(prompt, found[prompt.name])
    return found


def _headed(
    runtime: Runtime, shipped: PromptFile, name: str, task: str, template: Template, labels: Sequence[str]
) -> PromptFile:
    """The shipped prompt with a random head on every token."""
    rng, width = np.random.default_rng(5), runtime.manifest.geometry.hidden_size
    head = {"out.weight": rng.normal(0, 0.2, (len(labels), width)).astype(np.float32)}
    if task == "tag" and shipped.prompt_embeddings is not None:
        template = Template.parse("{prompt}{text}")
    return dataclasses.replace(
        shipped, name=name, task=task, template=template, verbalizer={}, golden=None, calibration=(), generation={},
        head=head, head_spec=Head("tokens", (HeadStep("linear", "out"),)), labels=() if task == "qa" else tuple(labels),
    )  # fmt: skip


def python_answers(runtime: Runtime, prompts: dict[str, Path], count: int) -> dict[str, Any]:
    """What Python says, one request at a time."""
    asked_of = labelled(count)
    rows = asked_of["source"]
    found: dict[str, Any] = {
        task: [runtime.classify(text, prompt=task) for text in asked_of[task]] for task in asked_of
    }
    located = rows[:LOCATED]
    found["tags"] = [asdict(runtime.run([Request(text, "tags")])[0]) for text in located]
    asked = [Request({"question": QUESTION, "context": text}, "answers") for text in located]
    found["answers"] = [asdict(runtime.run([one])[0]) for one in asked]
    if "restore" in prompts:
        found["words"] = [runtime.classify(text, prompt="words") for text in rows[:WORDS]]
        sources = [text for text, _ in texts("restore")[:GENERATIONS]]
        say = lambda text, **more: list(runtime.generate(text, prompt="restore", max_new_tokens=32, **more).token_ids)  # noqa: E731
        found["greedy"] = [say(text) for text in sources]
        found["seeded"] = [say(text, seed=seed, **SAMPLED) for seed, text in enumerate(sources[:SEEDED])]
    return found


def javascript_calls(prompts: dict[str, Path], count: int) -> list[tuple[str, list[Any]]]:
    """The same questions: (what, method and arguments)."""
    asked_of = labelled(count)
    rows = asked_of["source"]
    calls: list[tuple[str, list[Any]]] = [
        (task, ["classify", given, {"prompt": task}]) for task, given in asked_of.items()
    ]
    calls.append(("tags", ["tag", rows[:LOCATED], {"prompt": "tags"}]))
    calls += [("answers", ["answer", QUESTION, text, {"prompt": "answers"}]) for text in rows[:LOCATED]]
    if "restore" in prompts:
        calls.append(("words", ["classify", rows[:WORDS], {"prompt": "words"}]))
        sources = [text for text, _ in texts("restore")[:GENERATIONS]]
        options = {"prompt": "restore", "maxNewTokens": 32}
        calls += [("greedy", ["generate", text, options]) for text in sources]
        sampled = {"temperature": 1.0, "topP": 0.9, "topK": 50}
        calls += [("seeded", ["generate", text, {**options, **sampled, "seed": seed}])
                  for seed, text in enumerate(sources[:SEEDED])]  # fmt: skip
    return calls


def gathered(calls: list[tuple[str, list[Any]]], answers: list[Any]) -> dict[str, list[Any]]:
    """Answers by what was asked."""
    found: dict[str, list[Any]] = {}
    for (what, (method, *_)), answer in zip(calls, answers, strict=True):
        if isinstance(answer, dict) and "error" in answer:
            raise SystemExit(f"{what}: {answer['error']}: {answer['message']}")
        one = [said["tokenIds"] for said in [answer]] if method == "generate" else answer
        found.setdefault(what, []).extend(one if isinstance(one, list) else [one])
    return found


def in_node(folder: Path, prompts: dict[str, Path], calls: list[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """Node.js' answers."""
    added = [{"prompt": str(file), "options": {"name": name}} for name, file in prompts.items()]
    asked = [{"method": method, "args": args} for _, (method, *args) in calls]
    options = {"threads": 1, "allowOtherWeights": True}
    said = _node("test/drive.mjs", way="serve", package=str(folder), options=options, calls=[*added, *asked])
    for one in said:
        if "error" in one:
            raise SystemExit(f"{one['error']}: {one['message']}")
    return gathered(calls, [one["value"] for one in said[len(added) :]])


def _node(script: str, **asked: Any) -> Any:
    done = subprocess.run(
        ["node", ROOT / "js" / script], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def labels_of(one: Any) -> tuple[str, dict[str, float]]:
    """Label and logits of either runtime."""
    return (one["label"], one["logits"]) if isinstance(one, dict) else (one.label, dict(one.logits))


def compare_labels(expected: list[Any], found: list[Any]) -> dict[str, Any]:
    """How many labels are the same, and how far logits are from each other."""
    pairs = [(labels_of(one), labels_of(other)) for one, other in zip(expected, found, strict=True)]
    apart = [max(abs(one[1][name] - other[1][name]) for name in one[1]) for one, other in pairs]
    same = sum(one[0] == other[0] for one, other in pairs)
    return {"texts": len(pairs), "same": same, "logits_mean": float(np.mean(apart)), "logits_most": max(apart)}


def compare_tokens(expected: list[list[int]], found: list[list[int]]) -> dict[str, int]:
    """How many texts are the same, and how many of their first tokens."""
    pairs = list(zip(expected, found, strict=True))
    agreeing = sum(
        next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        for one, other in pairs
    )
    total = sum(len(one) for one, _ in pairs)
    return {"texts": len(pairs), "same": sum(a == b for a, b in pairs), "tokens": total, "agreeing": agreeing}


def compare(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Every kind of answer."""
    result: dict[str, Any] = {}
    for what, answers in expected.items():
        if what in ("greedy", "seeded"):
            result[what] = compare_tokens(answers, found[what])
        elif what in ("tags", "answers"):
            pairs = list(zip(answers, found[what], strict=True))
            apart = max(_scores_apart(one, other) for one, other in pairs)
            result[what] = {
                "texts": len(pairs),
                "same": sum(_bare(a) == _bare(b) for a, b in pairs),
                "scores_most": apart,
            }
        else:
            result[what] = compare_labels(answers, found[what])
    return result


def _bare(one: Any) -> Any:
    """An answer without its scores."""
    if isinstance(one, dict):
        return {name: _bare(value) for name, value in one.items() if name != "score"}
    return [_bare(value) for value in one] if isinstance(one, list | tuple) else one


def _scores_apart(one: Any, other: Any) -> float:
    if isinstance(one, dict):
        own = abs(one["score"] - other["score"]) if "score" in one else 0.0
        return max([own, *(_scores_apart(value, other[name]) for name, value in one.items())])
    if isinstance(one, list | tuple):
        return max([0.0, *(_scores_apart(a, b) for a, b in zip(one, other, strict=False))])
    return 0.0


def node(name: str, count: int) -> dict[str, Any]:
    """Node.js beside Python on one package."""
    folder = folder_of(name)
    with tempfile.TemporaryDirectory() as scratch, edgeprompt.load(folder, options=OPTIONS) as runtime:
        prompts = prompts_of(runtime, name, Path(scratch))
        for prompt, file in prompts.items():
            runtime.add_prompt(file, name=prompt)
        expected = python_answers(runtime, prompts, count)
        return compare(expected, in_node(folder, prompts, javascript_calls(prompts, count)))


def browser(count: int) -> dict[str, Any]:
    """Chromium beside Python on the web package, and Python beside itself with prompts that are a little different."""
    folder, found = folder_of("web"), {}
    chromium = _node("tools/chromium.mjs")
    with tempfile.TemporaryDirectory() as scratch, edgeprompt.load(folder, options=OPTIONS) as runtime:
        prompts = prompts_of(runtime, "web", Path(scratch))
        for prompt, file in prompts.items():
            runtime.add_prompt(file, name=prompt)
        calls = javascript_calls(prompts, count)
        expected = python_answers(runtime, prompts, count)
        asked = {"package": str(folder), "prompts": {name: str(file) for name, file in prompts.items()}}
        said = _node(
            "tools/ask.mjs", **chromium, **asked, calls=[call for _, call in calls], options={"allowOtherWeights": True}
        )
        found = {"version": said["browser"], "browser": compare(expected, gathered(calls, said["found"]))}
        found["changed"] = []
        for seed in range(CHANGES):
            rng = np.random.default_rng(seed)
            for prompt, file in prompts.items():
                whole = load_prompt(file)
                assert whole.prompt_embeddings is not None
                noise = rng.standard_normal(whole.prompt_embeddings.shape).astype(np.float32)
                rows = whole.prompt_embeddings * (1 + np.float32(1e-6) * noise)
                runtime.add_prompt(dataclasses.replace(whole, prompt_embeddings=rows), name=prompt)
            found["changed"].append(compare(expected, python_answers(runtime, prompts, count)))
    return found


def keys_and_values() -> dict[str, Any]:
    """Unmodified transformers.js with three tasks' prompts as keys and values, in Node.js and in Chromium.

    It is compared with this runtime on the same graph: with Python, which has the prompt's rows, and in Chromium with
    the npm package, which has the same keys and values (those of other kernels would differ in their last bits).
    """
    folder, chromium = folder_of("web"), _node("tools/chromium.mjs")
    tasks = ("restore", "sentiment", "source")
    with tempfile.TemporaryDirectory() as scratch, edgeprompt.load(folder, options=OPTIONS) as runtime:
        prompts = {task: PROMPTS / f"{task}.safetensors" for task in tasks}
        asked, calls, expected = [], [], []
        files: dict[str, str] = {}
        for task, file in prompts.items():
            runtime.add_prompt(file, name=task)
            values = Path(scratch) / f"{task}-kv.safetensors"
            convert_prompt(file, values, target="kv", base=folder)
            files[task] = str(Path(scratch) / f"{task}.safetensors")
            save_prompt(_as_prefix(load_prompt(file), load_file(values)), files[task])
        for number, (text, _) in enumerate(texts("restore")[:GENERATIONS]):
            task = tasks[number % len(tasks)]
            suffix = str(load_prompt(prompts[task]).template).removeprefix("{prompt}{text}")
            ids = [*runtime._package.tokenizer.encode(text + suffix)]
            asked.append({"ids": ids, "kv": str(Path(scratch) / f"{task}-kv.safetensors")})
            calls.append(["generate", "", {"inputIds": ids, "prompt": task, "maxNewTokens": KV_TOKENS}])
            expected.append(list(runtime.generate(input_ids=ids, prompt=task, max_new_tokens=KV_TOKENS).token_ids))
        eos = {*runtime.manifest.tokens.eos}
        model = {"models": f"{folder.parent}/", "model": folder.name, "calls": asked, "maxNewTokens": KV_TOKENS}
        in_node = _node("test/transformers.mjs", **model)["found"]
        in_browser = _node("test/transformers-browser.mjs", **chromium, **model)["found"]
        ours = _node(
            "tools/ask.mjs",
            **chromium,
            package=str(folder),
            prompts=files,
            calls=calls,
            options={"allowOtherWeights": True},
        )["found"]

    def ended(ids: list[int]) -> list[int]:
        return list(takewhile(lambda token: token not in eos, ids))

    return {
        "node": compare_tokens(expected, [ended(ids) for ids in in_node]),
        "chromium": compare_tokens([one["tokenIds"] for one in ours], [ended(ids) for ids in in_browser]),
    }


def _as_prefix(prompt: PromptFile, values: dict[str, Any]) -> PromptFile:
    """The prompt as a prefix of these keys and values."""
    layers = range(len(values) // 2)
    pairs = [[values[f"past_key_values.{layer}.{part}"][0] for part in ("key", "value")] for layer in layers]
    past = np.stack([np.stack(one) for one in pairs])
    return dataclasses.replace(
        prompt, method="prefix-tuning", prompt_embeddings=None, past_key_values=past, golden=None,
        template=prompt.template.without_prompt(),
    )  # fmt: skip


def accuracy() -> dict[str, Any]:
    """Right labels of the shipped prompts on int8 and on the web package, on all held-out texts."""
    right: dict[str, dict[str, list[int]]] = {}
    data = {"sentiment": texts("movie"), "source": texts("source")[:1000]}
    for name in ("int8", "web"):
        with edgeprompt.load(folder_of(name), options=OPTIONS) as runtime:
            for task, rows in data.items():
                runtime.add_prompt(PROMPTS / f"{task}.safetensors", name=task)
                said = runtime.classify([text for text, _ in rows], prompt=task)
                right.setdefault(task, {})[name] = [
                    int(a.label == label) for a, (_, label) in zip(said, rows, strict=True)
                ]
    found = {}
    for task, by in right.items():
        less = np.subtract(by["web"], by["int8"])
        found[task] = {
            "texts": len(less), "int8": 100 * float(np.mean(by["int8"])), "web": 100 * float(np.mean(by["web"])),
            "web_less_int8": 100 * float(np.mean(less)),
            "standard_error": 100 * float(np.std(less, ddof=1) / np.sqrt(len(less))),
        }  # fmt: skip
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    kinds = ("sentiment", "source", "words", "greedy", "seeded", "tags", "answers")
    heads = ("label, 2 words", "label, 4 words", "words of several tokens", "generations", "seeded", "tags", "answers")
    rows = ["| package | " + " | ".join(heads) + " | logits, most |", "| --- |" + " --- |" * (len(heads) + 1)]

    def cells(one: dict[str, Any]) -> str:
        counts = [f"{one[kind]['same']}/{one[kind]['texts']}" if kind in one else "" for kind in kinds]
        most = max(one[kind]["logits_most"] for kind in kinds if "logits_most" in one.get(kind, {}))
        return " | ".join([*counts, f"{most:.1e}"])

    rows += [f"| {name} | {cells(one)} |" for name, one in result.get("node", {}).items()]
    if "browser" in result:
        rows += [f"| web, Chromium {result['browser']['version']} | {cells(result['browser']['browser'])} |"]
        rows += [f"| web, Python with a prompt changed by 1e-6 ({i + 1}) | {cells(one)} |"
                 for i, one in enumerate(result["browser"]["changed"])]  # fmt: skip
    for where, one in result.get("keys_and_values", {}).items():
        rows += ["", f"transformers.js with keys and values, {where}: {one['same']} of {one['texts']} texts the same"]
    for task, one in result.get("accuracy", {}).items():
        rows += ["", f"{task}, {one['texts']} held-out texts: int8 {one['int8']:.1f} %, web {one['web']:.1f} %; "
                 f"{one['web_less_int8']:+.1f} ± {one['standard_error']:.1f} points"]  # fmt: skip
    return "\n".join([*rows, "", line(result["machine"])])


def main() -> None:
    """Measure what was asked for, write it beside what is there, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=400, help="to label, half of them by either task")
    parser.add_argument("--packages", default=",".join(PACKAGES))
    parser.add_argument("--browser", action="store_true", help="Chromium instead of Node.js")
    parser.add_argument("--kv", action="store_true", help="transformers.js with prompts as keys and values instead")
    parser.add_argument("--accuracy", action="store_true", help="right labels of int8 and web instead")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    given = parser.parse_args()
    ways = {"browser": lambda: browser(given.texts), "keys_and_values": keys_and_values, "accuracy": accuracy}
    asked = {"browser": given.browser, "keys_and_values": given.kv, "accuracy": given.accuracy}
    found: dict[str, Any] = {name: ways[name]() for name, wanted in asked.items() if wanted}
    if not found and not given.table:
        found = {"node": {name: node(name, given.texts) for name in given.packages.split(",")}}
    result: dict[str, Any] = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    if found:
        found["node"] = result.get("node", {}) | found.get("node", {})
        result = {**result, **found, "machine": describe()}
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
