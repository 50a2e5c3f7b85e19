"""The work with a base, the same for all peers: models made from one GGUF file, one prompt, the same texts."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.peers.bases import FILE, Base
from edgeprompt.cli.console import note

if TYPE_CHECKING:
    from edgeprompt.package.folder import Package

ROOT = Path(__file__).resolve().parents[2]
HARD_PROMPT = "Read this review of a film and say whether it is positive or negative, in one word:\n"
VIRTUAL_TOKENS, TEXT_TOKENS, CONTEXT = 16, (32, 128), 512
LABELS = {"negative": " negative", "positive": " positive"}
GENAI = {"genai": (), "genai-pruned": ("prune_lm_head=true",)}
"""Models of onnxruntime-genai: as its builder makes them by default, and with logits of the last position only."""
SUFFIX = "\nSentiment:"


def prepare(folder: Path, base: Base, *, threads: int) -> Path:
    """Make what is missing under `folder`; the path of `work.json`, which tells every worker what to do.

    A peer whose model cannot be made is reported as absent later, since its worker finds none.

    Args:
        folder: where models and prompts of this base are kept.
        base: the model.
        threads: that each peer may use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gguf, hf = base.file(folder), folder / "hf"
    if not hf.exists():
        save_hf(gguf, hf)
    for name, how in base.packages.items():
        if not (folder / name).exists():
            _export(gguf, folder / name, how)
    for name, options in GENAI.items():
        if not (folder / name).exists():
            build_genai(hf, folder / name, options)
    path = folder / "work.json"
    path.write_text(json.dumps(_describe(folder, hf, gguf, base, threads), indent=1) + "\n", encoding="utf-8")
    return path


def save_hf(gguf: Path, out: Path) -> None:
    from edgeprompt.base.load import load_base

    base = load_base(gguf)
    scratch = out.with_name("hf.partial")
    base.model.save_pretrained(scratch)
    base.tokenizer.save_pretrained(scratch)
    config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
    # transformers 4 (Optimum's) reads the base of the rotary embedding here, and would take a default without a word.
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta"))
    (scratch / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = json.loads((scratch / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 does not know the class that 5 names
    (scratch / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1), encoding="utf-8")
    scratch.replace(out)


def _export(gguf: Path, out: Path, how: dict[str, Any]) -> None:
    from exporters import export_model

    export_model(gguf, out, **how)


def build_genai(hf: Path, out: Path, more: tuple[str, ...]) -> None:
    """onnxruntime-genai's own int4 model, with the accuracy level that is fastest on processors; none if it fails."""
    scratch = out.with_name(f"{out.name}.partial")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    source = ["-i", hf, "-o", scratch, "-p", "int4", "-e", "cpu", "-c", out.with_name("cache")]
    done = subprocess.run(
        [*builder, *source, "--extra_options", "int4_accuracy_level=4", *more],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        note(f"onnxruntime-genai's builder failed on this base: {last}")
    else:
        scratch.replace(out)


def _describe(folder: Path, hf: Path, gguf: Path, base: Base, threads: int) -> dict[str, Any]:
    from edgeprompt.bench.workload import text_of
    from edgeprompt.package.folder import open_package

    package = open_package(folder / FILE)
    tokenizer = package.tokenizer
    texts = {
        str(count): [text_of(tokenizer, count, shift=7 * number) for number in range(base.texts)]
        for count in TEXT_TOKENS
    }
    return {
        "folder": str(folder),
        "hf": str(hf),
        "gguf": str(gguf),
        "threads": threads,
        "prompt": _prompt(folder, hf, package, VIRTUAL_TOKENS),
        "new_tokens": base.new_tokens,
        "context": CONTEXT,
        "texts": texts,
        "snippets": [text + SUFFIX for text in _snippets(base.snippets)],
        "suffix": SUFFIX,
        "labels": [tokenizer.encode(word, add_special_tokens=False)[0] for word in LABELS.values()],
    }


def _prompt(folder: Path, hf: Path, package: Package, count: int) -> dict[str, Any]:
    """A prompt of `count` tokens: its ids, its embeddings, and prompt files that hold those."""
    from edgeprompt.prompts.file import PromptFile, save_prompt
    from edgeprompt.prompts.template import Template

    ids: list[int] = package.tokenizer.encode(HARD_PROMPT * count, add_special_tokens=False)[:count]
    rows = _embedding_rows(hf, ids)
    home = folder / f"prompt-{count}"
    home.mkdir(exist_ok=True)
    np.save(home / "rows.npy", rows)
    # The soft prompt holds the hard prompt's embeddings: all peers compute the same, so that answers can be compared.
    plain = PromptFile(
        name="plain",
        method="prompt-tuning",
        task="generate",
        base=package.manifest.base,
        template=Template.parse("{prompt}{text}"),
        prompt_embeddings=rows,
        add_special_tokens=False,
    )
    sentiment = dataclasses.replace(
        plain,
        name="sentiment",
        task="classify",
        template=Template.parse("{prompt}{text}\nSentiment:"),
        verbalizer={label: (word,) for label, word in LABELS.items()},
    )
    for prompt in (plain, sentiment):
        save_prompt(prompt, home / f"{prompt.name}.safetensors")
    return {"ids": ids, "folder": str(home)}


def _embedding_rows(hf: Path, ids: list[int]) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(hf / "model.safetensors", "np") as file:
        table = file.get_slice("model.embed_tokens.weight")
        return np.concatenate([table[token : token + 1] for token in ids]).astype(np.float32)


def _snippets(count: int) -> list[str]:
    found: list[str] = []
    for name in ("movie.train.csv", "movie.test.csv"):
        with (ROOT / "examples/data" / name).open(encoding="utf-8", newline="") as file:
            found += [row["text"] for row in csv.DictReader(file)]
    return found[:count]
