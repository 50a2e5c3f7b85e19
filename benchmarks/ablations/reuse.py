"""Keys and values that are computed once: many tasks over one text, a chat, a long instruction.

    python -m benchmarks.ablations.reuse [--precision int8] [--threads 1] [--rounds 3]

Each part runs twice, alternating: as it is, and in a runtime that keeps no text (`reuse_texts=False`), which computes
every request from its first token. Answers of both are compared. The rows of the prompts are drawn from the shipped
ones: what is measured is the way to an answer, not the answer.

    tasks         8 text-first prompts over one text of 512 tokens, by `run_tasks`
    chat          ten turns of 16 new tokens each; seconds to the first token of every turn
    instruction   20 texts behind one instruction with 19 examples

`--labels 400` compares labels instead of times: two text-first prompts over each of 400 held-out sentences, the second
behind keys and values of the first, against a runtime that keeps nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe, line
from edgeprompt import EngineOptions, PromptFile, Runtime, load_prompt
from edgeprompt.evaluation.data import read_records
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.template import Template

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "reuse.json"
LABELS_RESULT = RESULT.with_name("reuse-labels.json")
TASKS, TOKENS, TURNS, TEXTS = 8, 512, 10, 20
LABELS = (" good", " bad", " news", " film", " long", " short", " happy", " sad", " old", " new")
QUESTIONS = (
    "What do you think of old films?",
    "And which of them would you show to a child?",
    "Why that one?",
    "Tell me how long it is, and whether it has songs.",
    "Who made it?",
    "What else did they make?",
    "Is there a book about it?",
    "Where was it shown first?",
    "How was it received?",
    "Sum up what you said.",
)


def sentences(count: int) -> list[str]:
    """Real sentences of the training half."""
    rows = islice(read_records(ROOT / "examples" / "data" / "movie.train.csv"), count)
    return [str(row["text"]) for row in rows]


def prompts(shipped: PromptFile) -> list[PromptFile]:
    """Text-first tasks with rows of their own."""
    rng, rows = np.random.default_rng(0), shipped.prompt_embeddings
    assert rows is not None
    found = []
    for number in range(TASKS):
        words = {word.strip(): (word,) for word in LABELS[number : number + 3]}
        own = rows[rng.permutation(len(rows))]
        template = Template.parse(f"{{text}}{{prompt}}\nTask {number}:")
        changes = {"verbalizer": words, "template": template, "prompt_embeddings": own, "calibration": ()}
        found.append(dataclasses.replace(shipped, name=f"task{number}", golden=None, **changes))
    return found


def tasks(runtime: Runtime, shipped: PromptFile, number: int) -> tuple[list[float], list[Any]]:
    """Seconds for all tasks together, and their scores."""
    if "task0" not in runtime.prompts:
        for prompt in prompts(shipped):
            runtime.add_prompt(prompt, allow_base_mismatch=True)
    tokenizer: Any = runtime._package.tokenizer
    text = tokenizer.truncate(" ".join(sentences(40 + number)[number:]), TOKENS)
    started = time.perf_counter()
    found: Any = runtime.run_tasks(text, [f"task{number}" for number in range(TASKS)])
    return [time.perf_counter() - started], [dict(result.scores) for result in found.values()]


def chat(runtime: Runtime, shipped: PromptFile, number: int) -> tuple[list[float], list[Any]]:
    """Seconds to the first token of every turn, and the answers."""
    messages, times = [{"role": "system", "content": f"You know films. This is talk {number}."}], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        result = runtime.chat(messages, max_new_tokens=16)
        times.append(result.timings.ttft)
        messages.append({"role": "assistant", "content": result.text})
    return times, [message["content"] for message in messages]


def instruction(runtime: Runtime, shipped: PromptFile, number: int) -> tuple[list[float], list[Any]]:
    """Seconds for a text, and the scores."""
    name, examples = f"instruction{number}", sentences(19 + number)[number:]
    shots = "\n".join(f"Review: {text}\nSentiment: positive" for text in examples).replace("{", "(").replace("}", ")")
    template = Template.parse(f"Say what the reviewer thinks.\n{shots}\nReview: {{text}}\nSentiment:")
    if name not in runtime.prompts:
        plain = dataclasses.replace(shipped, name=name, golden=None, template=template, prompt_embeddings=None)
        runtime.add_prompt(plain, allow_base_mismatch=True)
    times, scores = [], []
    for text in sentences(60 + TEXTS)[60:]:
        started = time.perf_counter()
        scores.append(dict(runtime.classify(text, prompt=name).scores))
        times.append(time.perf_counter() - started)
    return [sum(times) / len(times)], scores


PARTS: dict[str, Callable[[Runtime, PromptFile, int], tuple[list[float], list[Any]]]] = {
    "tasks": tasks,
    "chat": chat,
    "instruction": instruction,
}


def measure(precision: str, threads: int, rounds: int) -> dict[str, Any]:
    """Every part, with and without, alternating."""
    shipped, found = load_prompt(ROOT / "examples" / "prompts" / "sentiment.safetensors"), dict[str, Any]()
    opened = open_package(package(precision))
    with (
        Runtime(opened, EngineOptions(provider="cpu", threads=threads)) as kept,
        Runtime(opened, EngineOptions(provider="cpu", threads=threads, reuse_texts=False)) as nothing,
    ):
        for name, part in PARTS.items():
            times: dict[str, list[list[float]]] = {"kept": [], "nothing kept": []}
            same = []
            for number in range(rounds):
                fast, answers = part(kept, shipped, number)
                slow, alone = part(nothing, shipped, number)
                times["kept"].append(fast)
                times["nothing kept"].append(slow)
                same += [one == other for one, other in zip(answers, alone, strict=True)]
            medians = {way: [statistics.median(run[at] for run in runs) for at in range(len(runs[0]))]
                       for way, runs in times.items()}  # fmt: skip
            found[name] = {
                "seconds": medians,
                "ratio": [fast / slow for fast, slow in zip(*medians.values(), strict=True)],
                "identical_answers": f"{sum(same)} of {len(same)}",
            }
            print(precision, name, found[name], flush=True)
    return found


def labels(precision: str, threads: int, count: int) -> dict[str, Any]:
    """Labels and scores with reuse and without, and how many texts are near a tie."""
    shipped, opened = (
        load_prompt(ROOT / "examples" / "prompts" / "sentiment.safetensors"),
        open_package(package(precision)),
    )
    files = ("movie.test.csv", "source.test.csv", "movie.train.csv")
    rows = (row for file in files for row in read_records(ROOT / "examples" / "data" / file))
    texts = [*dict.fromkeys(str(row["text"]) for row in rows)][:count]
    found, reused = dict[bool, list[Any]](), 0
    for keeps in (True, False):
        options = EngineOptions(provider="cpu", threads=threads, reuse_texts=keeps, allow_other_weights=True)
        with Runtime(opened, options) as runtime:
            for name in ("first", "second"):
                template = Template.parse(f"{{text}}{{prompt}}\nSentiment, {name}:")
                changes: dict[str, Any] = {"template": template, "calibration": (), "golden": None}
                runtime.add_prompt(dataclasses.replace(shipped, name=name, **changes), allow_base_mismatch=True)
            answers: list[Any] = [runtime.run_tasks(text, ["first", "second"])["second"] for text in texts]
        found[keeps] = answers
        reused += sum(answer.timings.reused_tokens for answer in answers)
    pairs = [*zip(found[True], found[False], strict=True)]
    margins = [abs(np.subtract(*sorted(alone.logits.values())[-2:])) for _, alone in pairs]
    return {
        "texts": len(texts),
        "reused_tokens_each": reused / len(texts),
        "equal_labels": sum(one.label == other.label for one, other in pairs),
        "equal_scores": sum(dict(one.scores) == dict(other.scores) for one, other in pairs),
        "largest_difference": max(
            float(abs(one.logits[k] - other.logits[k])) for one, other in pairs for k in one.logits
        ),
        "near_ties": {str(bound): sum(bool(margin < bound) for margin in margins) for bound in (0.01, 0.05, 0.2)},
    }


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["int8", "int4", "fp32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labels", type=int, metavar="N", help="compare the labels of N texts instead")
    options = parser.parse_args()
    machine = describe()
    if options.labels:
        equal = {name: labels(name, options.threads, options.labels) for name in options.precision}
        LABELS_RESULT.write_text(
            json.dumps({"machine": machine, "precisions": equal}, indent=1) + "\n", encoding="utf-8"
        )
        print(json.dumps(equal, indent=1))
        return
    rows = {name: measure(name, options.threads, options.rounds) for name in options.precision}
    facts = {"machine": machine, "threads": options.threads, "rounds": options.rounds, "precisions": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("| package | part | kept (s) | nothing kept (s) | ratio | identical answers |\n|---|---|---|---|---|---|")
    for precision, parts in rows.items():
        for name, part in parts.items():
            for turn in (1, TURNS - 1) if name == "chat" else (0,):
                fast, slow = (part["seconds"][way][turn] for way in ("kept", "nothing kept"))
                title = f"chat, turn {turn + 1}, first token" if name == "chat" else name
                cells = f"{fast:.3f} | {slow:.3f} | {fast / slow:.2f} | {part['identical_answers']}"
                print(f"| {precision} | {title} | {cells} |")
    print(f"\n{line(machine)}")


if __name__ == "__main__":
    main()
