"""Whether SmolLM2's fp32 package computes what PEFT in PyTorch computes, on real sentences and with every method.

    python -m benchmarks.quality.parity [--texts 50] [--tokens 16]

For each method a prompt is tuned for a few steps and saved twice, as a prompt file and as a PEFT adapter. The package
generates greedily behind the prompt file; PEFT loads the adapter and is shown what was generated, and must prefer each
token, one after the other, to all others: then its own greedy answer is the same. Logits are compared behind the text
and behind all that was generated. Writes benchmarks/results/parity.json and docs/parity-decoders.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.utils import logging

from benchmarks.machine import describe, line
from edgeprompt import Runtime, load
from edgeprompt.base.load import load_base
from edgeprompt.tuning import TuneOptions, tune

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "data")]
from fetch import spoken  # noqa: E402
from models import WORK, model_file, package  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "parity.json"
TABLE = ROOT / "docs" / "parity-decoders.md"
DATA = ROOT / "examples" / "data"
FOLDER = WORK / "parity"
TEMPLATE = "{prompt}{text}\nWritten:"
METHODS: dict[str, dict[str, Any]] = {
    "prompt tuning": {},
    "P-tuning, MLP": {"method": "p-tuning"},
    "P-tuning, LSTM": {"method": "p-tuning", "encoder": "lstm"},
    "prefix tuning": {"method": "prefix-tuning"},
    "prefix tuning, projected": {"method": "prefix-tuning", "projection": True},
}
TUNE_ROWS = 32


def read(name: str) -> list[str]:
    """The sentences of a data file."""
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def tuned(name: str, method: dict[str, Any]) -> tuple[Path, Path]:
    """Prompt file and adapter of a method, made if they are not there yet."""
    stem = FOLDER / name.replace(", ", "-").replace(" ", "-")
    prompt, adapter = stem.with_suffix(".safetensors"), stem
    if not prompt.exists():
        rows = [{"text": spoken(text), "target": text} for text in read("movie.train.csv")[:TUNE_ROWS]]
        options = TuneOptions(
            **method, task="generate", template=TEMPLATE, steps=4, batch_size=4, eval_split=0.0, adapter=adapter
        )
        tune(model_file(), rows, output=prompt, options=options, progress=False)
    return prompt, adapter


@torch.no_grad()
def compare(runtime: Runtime, model: Any, prompt: str, ids: list[int], tokens: int) -> tuple[bool, float, int]:
    """Whether all greedy tokens are PEFT's, the largest difference of a logit as a share of their scale, and how many
    tokens were compared."""
    answer = runtime.generate(input_ids=ids, prompt=prompt, max_new_tokens=tokens)
    made = list(answer.token_ids)
    wanted = model(input_ids=torch.tensor([ids + made])).logits[0, -len(made) - 1 :].numpy()
    expected = wanted.argmax(1).tolist()
    same = expected[: len(made)] == made
    if answer.finish_reason == "eos":
        same = same and expected[len(made)] in runtime.manifest.tokens.eos
    worst = 0.0
    for row, sequence in ((wanted[0], ids), (wanted[-1], ids + made)):
        found = runtime.logits(prompt=prompt, input_ids=sequence)
        worst = max(worst, float(np.abs(found - row).max() / np.abs(row).max()))
    return same, worst, len(made)


def main() -> None:
    """Compare, write the result and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    logging.disable_progress_bar()
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts = read("restore.test.csv")[: options.texts]
    result: dict[str, Any] = {}
    with load(package("fp32")) as runtime:
        for name, method in METHODS.items():
            prompt, adapter = tuned(name, method)
            loaded = load_base(str(model_file()))
            model = PeftModel.from_pretrained(loaded.model, str(adapter)).eval()
            runtime.add_prompt(prompt, allow_other_weights=True)
            slot = TEMPLATE.removeprefix("{prompt}")
            rows = [
                compare(runtime, model, prompt.stem, loaded.tokenizer(slot.format(text=text)).input_ids, options.tokens)
                for text in texts
            ]
            result[name] = {
                "texts": len(rows),
                "texts_with_equal_tokens": sum(same for same, _, _ in rows),
                "tokens": sum(count for _, _, count in rows),
                "largest_logit_difference": max(worst for _, worst, _ in rows),
            }
            print(name, result[name], flush=True)
    machine = describe()
    RESULT.write_text(json.dumps({"machine": machine, "methods": result}, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(to_markdown(result, machine), encoding="utf-8")


def to_markdown(result: dict[str, Any], machine: dict[str, Any]) -> str:
    """The page in docs/."""
    lines = [
        "# A real decoder: the package beside PEFT",
        "",
        "Written by `python -m benchmarks.quality.parity`. SmolLM2-135M-Instruct at fp32 in ONNX Runtime is",
        "compared with PyTorch + PEFT: the same prompts and held-out sentences, greedy decoding. Differences of",
        "logits are shares of the largest logit. They are taken behind the text and behind the whole answer, and",
        "1e-3 is allowed.",
        "",
        "| method | texts with equal tokens | tokens compared | largest difference |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result.items():
        share = f"{row['texts_with_equal_tokens']} of {row['texts']}"
        lines.append(f"| {name} | {share} | {row['tokens']} | {row['largest_logit_difference']:.1e} |")
    lines += ["", line(machine), "", "All families, as small random models: [parity-decoder-families.md]"]
    lines[-1] += "(parity-decoder-families.md)."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
