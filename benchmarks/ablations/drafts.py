"""Decoding with drafts from the text and without: an answer that copies, one that sums up, free text.

    python -m benchmarks.ablations.drafts [--packages FOLDER...] [--threads 2] [--texts 10] [--tokens 64]

Both ways run in turn in one process on the same package, text by text, the first of a pair alternating, so that what
else the machine does falls on both. Seconds are those of decoding, from the first token to the last; processor time is
the process's own. A third run, with steps of several positions and no draft, tells how many answers differ because of
the kernels alone: the run with drafts must have its tokens.

    restore    sentences without case and punctuation, with the shipped prompt (`examples/prompts/restore.safetensors`)
    summary    four sentences, and the instruction to say them in one
    free       the beginning of a sentence, to be continued
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line
from edgeprompt import EngineOptions, Generation, GenerationOptions, Request, Runtime
from edgeprompt.decoding.drafts import PromptLookup
from edgeprompt.evaluation.data import read_records
from edgeprompt.package.folder import open_package

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
from models import GEMMA3, SMOLLM2, package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "drafts.json"
RESTORE = ROOT / "examples" / "prompts" / "restore.safetensors"
SHOWN = (
    "The text again, with capital letters and punctuation.\n"
    "Text: it was late and nobody not even the cook had eaten\n"
    "Written: It was late, and nobody, not even the cook, had eaten.\n"
)
"""For bases that the shipped prompt is not for."""


def tasks(count: int, *, shipped: bool) -> dict[str, tuple[str | None, list[str]]]:
    """Task -> its prompt's name and texts."""
    data = ROOT / "examples" / "data"
    lower = [str(record["text"]) for record in read_records(data / "restore.test.csv")]
    longer = [" ".join(lower[at : at + 2]) for at in range(0, 2 * count, 2)]
    films = [str(record["text"]) for record in read_records(data / "movie.test.csv")]
    restore = longer if shipped else [f"{SHOWN}Text: {text}\nWritten:" for text in longer]
    return {
        "restore": ("restore" if shipped else None, restore),
        "summary": (None, [f"{' '.join(films[at : at + 4])}\n\nIn one sentence:" for at in range(0, 4 * count, 4)]),
        "free": (None, [" ".join(film.split()[:6]) for film in films[-count:]]),
    }


def decode(
    runtime: Runtime, text: str, prompt: str | None, tokens: int, *, drafts: bool
) -> tuple[Generation, float, float]:
    """The answer, and the seconds and the processor's seconds of decoding."""
    began = list[float]()

    def first(_: str) -> None:
        if not began:
            began.append(time.process_time())

    options = GenerationOptions(max_new_tokens=tokens, drafts=drafts, temperature=0)
    found: Generation = runtime.submit(Request(text, prompt, task="generate", options=options), on_text=first).result()
    ended = time.process_time()
    return found, found.timings.total - found.timings.ttft, ended - began[0] if began else 0.0


def measure(folder: Path, threads: int, count: int, tokens: int) -> dict[str, Any]:
    """Every task on one package."""
    opened, found = open_package(folder), dict[str, Any]()
    options = EngineOptions(provider="cpu", threads=threads, reuse_texts=False, allow_other_weights=True)
    with Runtime(opened, options) as runtime:
        shipped = opened.manifest.base.name.startswith("SmolLM2")
        if shipped:
            runtime.add_prompt(RESTORE, allow_base_mismatch=True)
        for name, (prompt, texts) in tasks(count, shipped=shipped).items():
            for text in texts[:2]:  # sessions, and the widths of steps
                for drafts in (True, False):
                    decode(runtime, text, prompt, tokens, drafts=drafts)
            found[name] = _pairs(runtime, prompt, texts, tokens)
            print(folder.name, name, {key: value for key, value in found[name].items() if key != "pairs"}, flush=True)
        engine: Any = runtime._engine
        costs = engine._lanes[0]._costs
        found["milliseconds_of_a_step"] = {width: round(1e3 * costs.cost(width), 2) for width in (2, 4, 8)}
    return found


def _pairs(runtime: Runtime, prompt: str | None, texts: Sequence[str], tokens: int) -> dict[str, Any]:
    pairs, same, exact, drafted, accepted = list[dict[str, float]](), 0, 0, 0, 0
    draft = PromptLookup.draft
    for number, text in enumerate(texts):
        answers: dict[bool, Generation] = {}
        pair: dict[str, float] = {}
        for drafts in (True, False) if number % 2 else (False, True):
            answer, seconds, cpu = decode(runtime, text, prompt, tokens, drafts=drafts)
            way = "drafts" if drafts else "plain"
            steps = max(1, len(answer.token_ids) - 1)
            answers[drafts], pair[way], pair[f"{way}_cpu"] = answer, seconds / steps, cpu / steps
        PromptLookup.draft = lambda *_: ([], 0.0)  # type: ignore[method-assign]
        try:
            filled, _, _ = decode(runtime, text, prompt, tokens, drafts=True)
        finally:
            PromptLookup.draft = draft  # type: ignore[method-assign]
        exact += filled.token_ids == answers[True].token_ids
        same += answers[False].token_ids == answers[True].token_ids
        drafted += answers[True].timings.drafted_tokens
        accepted += answers[True].timings.accepted_tokens
        pair["tokens"] = len(answers[True].token_ids)
        pairs.append(pair)
    ratios = [pair["plain"] / pair["drafts"] for pair in pairs]
    cpu = [pair["plain_cpu"] / pair["drafts_cpu"] for pair in pairs if pair["drafts_cpu"] > 0]
    return {
        "tokens_per_second": {way: 1 / statistics.median(pair[way] for pair in pairs) for way in ("plain", "drafts")},
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "processor_time_ratio": [statistics.median(cpu), min(cpu), max(cpu)],
        "new_tokens": sum(pair["tokens"] for pair in pairs),
        "drafted": drafted,
        "accepted": accepted,
        "same_tokens_as_steps_of_several_positions": f"{exact} of {len(texts)}",
        "same_tokens_as_steps_of_one_position": f"{same} of {len(texts)}",
        "pairs": pairs,
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        "| package | task | tokens/s | with drafts | ratio (lowest to highest text) | ratio of processor time "
        "| new tokens: accepted of drafted | tokens as by the same kernels without drafts | as without drafts |",
        "|" + " --- |" * 9,
    ]
    for name, parts in result["packages"].items():
        for task, one in parts.items():
            if task == "milliseconds_of_a_step":
                continue
            (ratio, low, high), speed = one["ratio"], one["tokens_per_second"]
            lines.append(
                f"| {name} | {task} | {speed['plain']:.1f} | {speed['drafts']:.1f} "
                f"| {ratio:.2f} ({low:.2f} to {high:.2f}) | {one['processor_time_ratio'][0]:.2f} "
                f"| {one['new_tokens']}: {one['accepted']} of {one['drafted']} "
                f"| {one['same_tokens_as_steps_of_several_positions']} "
                f"| {one['same_tokens_as_steps_of_one_position']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, nargs="+", help="default: SmolLM2 at int4 and int8, Gemma 3 at int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    folders = options.packages or [package("int4", SMOLLM2), package("int8", SMOLLM2), package("int8", GEMMA3)]
    result: dict[str, Any] = {"machine": describe(), "threads": options.threads, "texts": options.texts}
    result |= {"tokens": options.tokens, "note": options.note, "packages": {}}
    for folder in folders:
        result["packages"][folder.name] = measure(folder, options.threads, options.texts, options.tokens)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(result))
    print(line(result["machine"]))


if __name__ == "__main__":
    main()
