"""From a language model to one quantised graph that serves three tasks: `make demo`.

Exports SmolLM2-135M at int4 (and validates it), tunes a small soft prompt for that very graph, evaluates it and the
shipped prompts on held-out sentences beside zero-shot and an 8-shot hard prompt, answers a mixed batch of tasks, and
times it all. Every figure printed is measured in this run, on this machine.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from models import ROOT, WORK, edgeprompt, edgeprompt_json, model_file
from rich.console import Console
from rich.table import Table

import edgeprompt as ep
from edgeprompt.package.folder import open_package

DATA = ROOT / "examples" / "data"
PROMPTS = ROOT / "examples" / "prompts"
DEMO = WORK / "demo"
TRAIN_STEPS, BATCH_SIZE = 40, 8
EVAL_ROWS, SHOT_ROWS = 120, 60
REPEATS = 15

console = Console(soft_wrap=False)


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(parents=True)
    package, mine = DEMO / "smollm2-int4", DEMO / "mine.safetensors"

    console.rule("1. Export once: the prompt is an input of the graph")
    edgeprompt("export", model_file(), "-o", package, "--precision", "int4")

    console.rule("2. Tune a soft prompt for this package's own weights")
    edgeprompt(
        *("tune", model_file(), DATA / "movie.train.csv", "-o", mine, "--for", package),
        *("--template", r"{prompt}{text}\nSentiment:"),
        *("--verbalizer", "negative= negative", "--verbalizer", "positive= positive"),
        *("--steps", TRAIN_STEPS, "--batch-size", BATCH_SIZE),
    )

    shipped = {path.stem: path for path in sorted(PROMPTS.glob("*.safetensors"))}
    shipped = {name: path for name, path in shipped.items() if is_for(path, package)}
    console.rule("3. Evaluate on held-out sentences")
    console.print(accuracy_table(package, mine, shipped))

    console.rule("4. One graph, three tasks, one batch")
    with ep.load(package) as runtime:
        tasks = [runtime.add_prompt(mine, name="mine")]
        tasks += [runtime.add_prompt(shipped[name]) for name in ("source", "restore") if name in shipped]
        console.print(mixed_table(runtime, tasks))
        console.rule("5. What it costs on this machine")
        console.print(cost_table(runtime, mine, tasks))
    console.print(f"The whole demo took {time.perf_counter() - started:.0f} s.")


def is_for(path: Path, package: Path) -> bool:
    """Whether a prompt is of a package's base, and was tuned for its precision."""
    prompt, manifest = ep.load_prompt(path), open_package(package).manifest
    same_precision = not prompt.tuned_weights or any(
        one.precision == manifest.precision for one in prompt.tuned_weights
    )
    return same_precision and prompt.base.matches(manifest.base)


def accuracy_table(package: Path, mine: Path, shipped: dict[str, Path]) -> Table:
    """The live prompt and the shipped ones beside what needs no training."""
    table = Table("task", "prompt", "metric", "held-out", "n")

    def add(task: str, *args: object) -> None:
        for row in edgeprompt_json("eval", package, *args):
            value = f"{100 * row['value']:.1f} ± {100 * row['standard_error']:.1f}"
            table.add_row(task, row["prompt"], row["metric"], value, str(row["n"]))

    movie = DATA / "movie.test.csv"
    add("sentiment", movie, "--prompt", mine, "--zero-shot", "--limit", EVAL_ROWS)
    shots = edgeprompt_json(
        *("eval", package, movie, "--prompt", mine, "--limit", SHOT_ROWS),
        *("--shots", 8, "--shots-from", DATA / "movie.train.csv"),
    )[-1]
    value = f"{100 * shots['value']:.1f} ± {100 * shots['standard_error']:.1f}"
    table.add_row("sentiment", shots["prompt"], shots["metric"], value, str(shots["n"]))
    if "sentiment" in shipped:
        add("sentiment", movie, "--prompt", shipped["sentiment"], "--limit", EVAL_ROWS)
    if "source" in shipped:
        add("source", DATA / "source.test.csv", "--prompt", shipped["source"], "--zero-shot", "--limit", EVAL_ROWS)
    if "restore" in shipped:
        restore = ("--metric", "bleu", "--limit", 20, "--zero-shot")
        add("restore", DATA / "restore.test.csv", "--prompt", shipped["restore"], *restore)
    return table


def mixed_table(runtime: ep.Runtime, tasks: list[str]) -> Table:
    """Rows of several tasks, answered in one call."""
    texts = (
        "a thoughtful film that earns every one of its tears",
        "the battery died after two days and nobody answers the phone",
    )
    requests = [ep.Request(text, task) for text in texts for task in tasks]
    table = Table("text", "task", "answer")
    for request, answer in zip(requests, runtime.run(requests), strict=True):
        shown = answer.label if isinstance(answer, ep.Classification) else answer.text.strip()
        table.add_row(str(request.text), request.prompt, shown)
    return table


def cost_table(runtime: ep.Runtime, mine: Path, tasks: list[str]) -> Table:
    """Median of repeated calls, in milliseconds."""
    text = "A thoughtful film that earns every one of its tears, and some of its laughs."
    runtime.add_prompt(mine, name="other")

    def classify(name: str) -> Callable[[], object]:
        return lambda: runtime.classify(text, prompt=name)

    classify("other")(), classify("mine")()  # both prefixes are computed now
    same, swapped = [], []
    for _ in range(REPEATS):  # interleaved, so that both see the same machine
        same.append(seconds(classify("mine")))
        swapped.append(seconds(classify("other")))
        classify("mine")()
    added = [seconds(lambda: runtime.add_prompt(mine, name="new")) for _ in range(REPEATS)]
    first = []
    for _ in range(REPEATS):
        runtime.add_prompt(mine, name="new")
        first.append(seconds(classify("new")))
    generations = [runtime.generate("Once upon a time", max_new_tokens=32) for _ in range(5)]

    table = Table(
        "measured", "median", caption=f"{runtime.provider}, {len(tasks)} tasks loaded, one text of this length"
    )
    table.add_row("classify, same task as before", milliseconds(same))
    table.add_row("classify, right after another task", milliseconds(swapped))
    table.add_row("add a prompt from its file", milliseconds(added))
    table.add_row("classify, first time after adding", milliseconds(first))
    table.add_row("generate: time to first token", milliseconds([found.timings.ttft for found in generations]))
    paces = [found.timings.tpot for found in generations if found.timings.tpot is not None]
    if paces:
        table.add_row("generate: time per output token", milliseconds(paces))
    table.add_row("prompt file", f"{mine.stat().st_size / 1000:.1f} kB")
    return table


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def milliseconds(values: list[float]) -> str:
    return f"{1000 * statistics.median(values):.1f} ms"


if __name__ == "__main__":
    main()
