"""The work, the same for all: models made from one GGUF file, one prompt, the same texts."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgeprompt.package.folder import Package

ROOT = Path(__file__).resolve().parents[2]
HARD_PROMPT = "Read this review of a film and say whether it is positive or negative, in one word:\n"
VIRTUAL_TOKENS, TEXT_TOKENS = 16, 32
"""Of the main measurements."""
NEW_TOKENS, CONTEXT = 64, 512
SNIPPETS = 256
LABELS = {"negative": " negative", "positive": " positive"}
PACKAGES: dict[str, dict[str, Any]] = {
    "int4-genai": {"precision": "int4", "route": "genai"},
    "int4-torch": {"precision": "int4", "route": "torch"},
    "int4-128-genai": {"precision": "int4", "route": "genai", "block_size": 128, "allow_quality_loss": True},
    "int8-genai": {"precision": "int8", "route": "genai"},
}
"""Our packages, and how they are exported."""
GENAI = {"genai": (), "genai-pruned": ("prune_lm_head=true",)}
"""Models of onnxruntime-genai: as its builder makes them by default, and with logits of the last position only."""
SUFFIX = "\nSentiment:"


def prepare(folder: Path, gguf: Path, *, threads: int, prompts: tuple[int, ...], texts: tuple[int, ...]) -> Path:
    """Make what is missing under `folder`; the path of `work.json`, which tells every worker what to do.

    Args:
        folder: where models and prompts are kept.
        gguf: the model.
        threads: that each peer may use.
        prompts: lengths of the prompt in the sweep, tokens.
        texts: lengths of the text in the sweep, tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf = folder / "hf"
    if not hf.exists():
        _save_hf(gguf, hf)
    for name, how in PACKAGES.items():
        if not (folder / name).exists():
            _export(gguf, folder / name, how)
    for name, options in GENAI.items():
        if not (folder / name).exists():
            _build_genai(hf, folder / name, options)
    work = _describe(folder, hf, gguf, threads, prompts, texts)
    path = folder / "work.json"
    path.write_text(json.dumps(work, indent=1) + "\n", encoding="utf-8")
    return path


def _save_hf(gguf: Path, out: Path) -> None:
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


def _build_genai(hf: Path, out: Path, more: tuple[str, ...]) -> None:
    """onnxruntime-genai's own int4 model, with the accuracy level that is fastest on processors."""
    scratch = out.with_name(f"{out.name}.partial")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    source = ["-i", hf, "-o", scratch, "-p", "int4", "-e", "cpu", "-c", out.with_name("cache")]
    subprocess.run(
        [*builder, *source, "--extra_options", "int4_accuracy_level=4", *more],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    scratch.replace(out)


def _describe(
    folder: Path, hf: Path, gguf: Path, threads: int, prompts: tuple[int, ...], texts: tuple[int, ...]
) -> dict[str, Any]:
    from edgeprompt.bench.workload import text_of
    from edgeprompt.package.folder import open_package

    package = open_package(folder / "int4-genai")
    tokenizer = package.tokenizer

    def texts_of(lengths: tuple[int, ...]) -> dict[str, list[str]]:
        return {str(count): [text_of(tokenizer, count, shift=7 * i) for i in range(6)] for count in lengths}

    return {
        "folder": str(folder),
        "hf": str(hf),
        "gguf": str(gguf),
        "threads": threads,
        "prompt": _prompt(folder, hf, package, VIRTUAL_TOKENS),
        "new_tokens": NEW_TOKENS,
        "context": CONTEXT,
        "texts": texts_of((TEXT_TOKENS,)),
        "sweep": {"prompts": [_prompt(folder, hf, package, count) for count in prompts], "texts": texts_of(texts)},
        "snippets": [text + SUFFIX for text in _snippets()],
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


def _snippets() -> list[str]:
    found: list[str] = []
    for name in ("movie.train.csv", "movie.test.csv"):
        with (ROOT / "examples/data" / name).open(encoding="utf-8", newline="") as file:
            found += [row["text"] for row in csv.DictReader(file)]
    return found[:SNIPPETS]
