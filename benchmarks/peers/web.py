"""A token, a label and a start in the browser: the web package beside the native ones and beside transformers.js.

    python -m benchmarks.peers.web WEB INT8 INT4 [--rounds 5]

WEB is exported with `--target web --layout hub`, INT8 and INT4 with these precisions, all of one base. Headless
Chromium runs ONNX Runtime's WebAssembly build on one thread. transformers.js has the web package's own weights. Writes
benchmarks/results/web.json; `--table` prints it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import edgeprompt
from benchmarks.machine import describe, line
from edgeprompt.options import EngineOptions
from edgeprompt.package.folder import open_package

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks/results/web.json"
PROMPT = ROOT / "examples/prompts/sentiment.safetensors"
TEXT = "Once upon a time, in a small village by the sea, there was a"
TOKENS = {"web": 24, "int8": 6, "int4": 4}
SUFFIX = "\nSentiment:"
INSTRUCTION = "Decide whether the sentiment of this text is negative or positive.\n"
EXAMPLES = 4
SNIPPETS = 21
"""The first only warms up."""


def main() -> None:
    """Measure and write, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", type=Path, help="WEB INT8 INT4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="Print what was measured.")
    given = parser.parse_args()
    if not given.table:
        if len(given.packages) != 3:
            parser.error("give three packages: WEB INT8 INT4")
        result = measure(dict(zip(TOKENS, map(Path.absolute, given.packages), strict=True)), given.rounds)
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(OUT.read_text("utf-8"))))


def measure(packages: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Everything, in one browser."""
    chromium = json.loads(_node("tools/chromium.mjs"))
    if chromium is None:
        raise SystemExit("no Chromium runs here; see js/tools/chromium.mjs")
    with (ROOT / "examples/data/movie.test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:SNIPPETS]
    with (ROOT / "examples/data/movie.train.csv").open(encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))[:EXAMPLES]
    examples = INSTRUCTION + "".join(f"{row['text']}{SUFFIX} {row['label']}\n\n" for row in shown)
    leads = {
        "16 positions": 16,
        "64 positions": 64,
        "an instruction": INSTRUCTION,
        f"an instruction and {EXAMPLES} examples": examples,
    }
    asked = {
        **chromium, "packages": {name: str(path) for name, path in packages.items()}, "beside": "web",
        "prompt": str(PROMPT), "text": TEXT, "suffix": SUFFIX, "leads": leads,
        "snippets": [row["text"] for row in rows], "tokens": TOKENS, "rounds": rounds,
    }  # fmt: skip
    options = EngineOptions(provider="cpu", threads=1, allow_other_weights=True)
    with edgeprompt.load(packages["web"], options=options) as runtime:
        runtime.add_prompt(PROMPT, name="task")
        native = [runtime.classify(row["text"], prompt="task").label for row in rows]
        generated = list(runtime.generate(TEXT, max_new_tokens=TOKENS["web"]).token_ids)
    found = json.loads(_node("tools/measure.mjs", json.dumps(asked)))
    labels = found.pop("labels")
    versions = {
        name: json.loads((ROOT / f"js/node_modules/{name}/package.json").read_text("utf-8"))["version"]
        for name in ("onnxruntime-web", "@huggingface/transformers")
    }
    sizes = {
        name: sum((path / file).stat().st_size for graph in open_package(path).manifest.graphs.values()
                  for file in (graph.file, *graph.data))
        for name, path in packages.items()
    }  # fmt: skip
    return {
        "machine": describe(),
        "js": versions,
        "bytes": sizes,
        "labels_as_native": sum(one == other for one, other in zip(labels, native, strict=True)) / len(native),
        "tokens_as_native": generated == found["results"]["web"]["token_ids"],
        **found,
    }


def _node(script: str, text: str = "") -> str:
    done = subprocess.run(
        ["node", ROOT / "js" / script], input=text, stdout=subprocess.PIPE, text=True, check=True, timeout=3000
    )
    return done.stdout.splitlines()[-1]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| package | MB | ms a token (least) | first load | second load | files fetched | peak resident |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one in result["results"].items():
        times = one["token_ms"]
        rows.append(
            f"| {name} | {result['bytes'][name] / 1e6:.0f} | {median(times):.0f} ({min(times):.0f}) | "
            f"{one['first_load_ms'] / 1000:.1f} s | {one['second_load_ms'] / 1000:.1f} s | "
            f"{one['first_files']}, then {one['second_files']} | {one['peak_bytes'] / 1e6:.0f} MB |"
        )
    rows += ["", "| by turns | edgeprompt | transformers.js | ratio of medians | ratio of pairs (median) |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for key, pair in result["pairs"].items():
        what = "ms a token"
        if key != "token_ms":
            what = f"ms a label; transformers.js reads {key} more ({median(pair['positions']):.0f} positions)"
        ours, theirs = pair["ours"], pair["theirs"]
        pairs = median(one / other for one, other in zip(ours, theirs, strict=True))
        middle, other = median(ours), median(theirs)
        rows.append(f"| {what} | {middle:.0f} | {other:.0f} | {middle / other:.2f} | {pairs:.2f} |")
    js = ", ".join(f"{name} {version}" for name, version in result["js"].items())
    rows += [
        "",
        f"Tokens of both: {'the same' if result['same_tokens'] else 'not the same'}. Labels as native: "
        f"{100 * result['labels_as_native']:.0f} %. Tokens as native: {'yes' if result['tokens_as_native'] else 'no'}. "
        f"Chromium {result['browser']}, {js}. {line(result['machine'])}",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
