"""What each remedy for 4-bit weights gives back of a sentiment prompt's accuracy.

    python -m benchmarks.ablations.levers [--limit 150] [--steps 70] [--way NAME ...]

Rows are ways to quantise SmolLM2's weights, each a package that ONNX Runtime serves: onnxruntime-genai's builder as it
is (round to nearest, the embedding too), the same with 8 bits for embedding and output layer, and edgeprompt's int4
(float block offsets as well; larger blocks without them). Columns are prompts of one recipe and seed: tuned on the
float32 weights, or on the row's own; each as it is and with its verbalizer calibrated on the row's package. Accuracy
is the mean over the first sentences of the four test sets. What exists under work/levers already is taken from there;
with --way, the other rows are those of the last result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, line
from benchmarks.quality.quantisation import eight, nearest
from edgeprompt import PromptFile, load, load_prompt
from edgeprompt.base.dequantize import check_closeness
from edgeprompt.base.load import load_base
from edgeprompt.evaluation.data import read_records
from edgeprompt.prompts.hard_prompt import hard_prompt
from exporters import export_model

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "prompts")]
from make import RECIPES  # noqa: E402
from models import WORK, edgeprompt, model_file, package  # noqa: E402

SETS = ("movie", "product", "tweets", "news")
FOLDER = WORK / "levers"
RESULT = ROOT / "benchmarks" / "results" / "levers.json"
RECIPE = RECIPES["sentiment"]
Quantise = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to store the weights."""

    title: str
    options: tuple[str, ...] | None = None
    """Of the GenAI builder; None: a package of edgeprompt's own."""
    layers: Quantise | None = None
    table: Quantise | None = None
    """What the builder does to weights, for training on them."""


WAYS = {
    "fp32": Way("float32"),
    "rtn": Way("4 bits, round to nearest (GenAI builder)", ("algo_config=default",), nearest, nearest),
    "rtn-table8": Way("the same, embedding 8 bits", ("algo_config=rtn_last",), nearest, eight),
    "int4": Way("int4 here: float block offsets, embedding 8 bits"),
    "int4-64": Way("int4 here with `--block-size 64`"),
    "int4-128": Way("int4 here with `--block-size 128`"),
}


def served(name: str) -> Path:
    """The package of a way."""
    way, out = WAYS[name], FOLDER / name
    if way.options is None:
        return package(name)
    if not out.exists():
        hf, built = FOLDER / "hf", FOLDER / f"{name}-built"
        if not hf.exists():
            loaded = load_base(model_file())
            loaded.model.save_pretrained(hf)
            loaded.tokenizer.save_pretrained(hf)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", hf, "-o", built, "-p", "int4"]
        settings = ["accuracy_level=4", "prune_lm_head=true", *way.options]
        command = [*builder, "-e", "cpu", "-c", FOLDER / "cache", "--extra_options", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        export_model(built, out, route="onnx", against=model_file(), allow_quality_loss=True)
    return out


def stored(name: str) -> Any:
    """The base in PyTorch with the weights that a builder's package holds."""
    way, loaded = WAYS[name], load_base(model_file())
    assert way.layers is not None
    assert way.table is not None
    with torch.no_grad():
        for key, value in loaded.model.named_parameters():
            if value.dim() == 2:
                value.copy_((way.table if "embed" in key else way.layers)(value))
    return loaded


def tuned(name: str, steps: int) -> Path:
    """The prompt tuned on a way's weights."""
    out = FOLDER / f"{name}-{steps}.safetensors"
    if out.exists():
        return out
    train, dev, _ = RECIPE.files()
    target: tuple[object, ...] = ("--for", package(name)) if name.startswith("int4") else ()
    base: Path = model_file()
    if WAYS[name].layers is not None:
        base, loaded = FOLDER / "weights", stored(name)
        loaded.model.save_pretrained(base)
        loaded.tokenizer.save_pretrained(base)
    edgeprompt("tune", base, train, "-o", out, "--eval", dev, *target, *RECIPE.tune, "--steps", steps)
    shutil.rmtree(FOLDER / "weights", ignore_errors=True)
    return out


def accuracy(runtime: Any, file: PromptFile, limit: int) -> dict[str, dict[str, float]]:
    """Test set -> accuracy "plain" and "calibrated", by one pass over its first sentences."""
    # The builder's embedding is another after quantisation, so a prompt tuned on it names another base.
    name = runtime.add_prompt(dataclasses.replace(file, calibration=()), allow_base_mismatch=True)
    prior = np.array(runtime.calibration(name))
    found = {}
    for data in SETS:
        rows = list(islice(read_records(WORK / "data" / f"{data}.test.csv"), limit))
        answers = runtime.classify([row["text"] for row in rows], prompt=name)
        labels = list(answers[0].logits)
        scores = np.array([list(answer.logits.values()) for answer in answers])
        right = np.array([labels.index(row["label"]) for row in rows])
        found[data] = {
            "plain": float((scores.argmax(1) == right).mean()),
            "calibrated": float(((scores - prior).argmax(1) == right).mean()),
        }
    return found


def closeness(name: str, prompt: PromptFile) -> dict[str, float]:
    """How closely the weights that a prompt was tuned on follow a builder's package."""
    loaded = stored(name)
    text = "The film starts slowly, but the last half hour is worth the ticket.\nSentiment:"
    vocab = loaded.config.vocab_size
    ids = [*range(vocab, vocab + prompt.num_virtual_tokens), *loaded.tokenizer(text).input_ids]
    return dataclasses.asdict(check_closeness(loaded.model, served(name), [ids], prompt.prompt_embeddings))


def main() -> None:
    """Run what is missing, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=150, help="sentences of each test set (news has 134)")
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--way", action="append", choices=WAYS, help="only this row (may be repeated)")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = describe()
    recipe = {"steps": options.steps, "sentences_of_each_set": options.limit}
    rows: dict[str, dict[str, Any]] = {}
    if options.way:
        last = json.loads(RESULT.read_text(encoding="utf-8"))
        if recipe != {key: last[key] for key in recipe}:
            raise SystemExit(f"{RESULT.name} has other steps or sentences; leave out --way")
        rows = last["ways"]
    plain = load_prompt(tuned("fp32", options.steps))
    for name in options.way or WAYS:
        own = load_prompt(tuned(name, options.steps))
        prompts = {"zero-shot": hard_prompt(plain, "", name="zero-shot"), "tuned on float32": plain, "tuned on it": own}
        with load(served(name)) as runtime:
            found = {title: accuracy(runtime, prompt, options.limit) for title, prompt in prompts.items()}
        rows[name] = {"day": machine["day"], **found}
        if WAYS[name].layers is not None:
            rows[name]["training follows the graph"] = closeness(name, own)
        print(name, rows[name], flush=True)
    facts: dict[str, Any] = {"machine": machine, **recipe, "ways": {name: rows[name] for name in WAYS if name in rows}}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    columns = [
        (title, how) for title in ("zero-shot", "tuned on float32", "tuned on it") for how in ("plain", "calibrated")
    ]
    heads = [title if how == "plain" else "calibrated" for title, how in columns]
    print(f"| weights | {' | '.join(heads)} |\n|---|" + "---|" * len(heads))
    for name, row in facts["ways"].items():
        cells = [f"{100 * np.mean([row[title][data][how] for data in SETS]):.1f}" for title, how in columns]
        print(f"| {WAYS[name].title} | {' | '.join(cells)} |")
    print(f"\n{line(machine)}")


if __name__ == "__main__":
    main()
