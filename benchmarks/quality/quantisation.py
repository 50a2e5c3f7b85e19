"""What each way to quantise weights does to the model's answers, before any prompt is tuned for it.

    python -m benchmarks.quality.quantisation [--texts 60] [--out benchmarks/results/quantisation.json]

PyTorch in float32 computes with the weights as each way stores them, on real sentences; the figures compare logits
of the last position with the unquantised model's. "margin" is the logit of " positive" less that of " negative",
which is what the sentiment prompts decide by. The last rows run the int4 package itself (its activations are int8).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from edgeprompt import load
from edgeprompt.base.blockwise import quantize_affine, quantize_blocks, quantize_symmetric
from edgeprompt.base.load import load_base

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import model_file, package  # noqa: E402

TEMPLATE = "{}\nSentiment:"
Quantise = Callable[[torch.Tensor], torch.Tensor]


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric round-to-nearest, blocks of 32: what most converters do by default."""
    values = weight.reshape(-1, 32)
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = torch.where(largest == 0, 1.0, largest / -8)
    return (torch.round(values / scale).clamp(-8, 7) * scale).reshape(weight.shape)


def fitted(weight: torch.Tensor) -> torch.Tensor:
    """Asymmetric with integer zero points, the scale of least squared error (as k-quants do)."""
    return quantize_blocks(weight, bits=4).dequantize()


def offsets(weight: torch.Tensor) -> torch.Tensor:
    """Float offsets beside integer zero points, themselves at 4 bits: edgeprompt's int4."""
    blocks, left = quantize_affine(weight)
    padded = torch.nn.functional.pad(left, (0, -left.shape[1] % 32))
    stored = quantize_blocks(padded, bits=4).dequantize()[:, : left.shape[1]]
    return blocks.dequantize() + stored.repeat_interleave(32, dim=1)


def eight(weight: torch.Tensor) -> torch.Tensor:
    """8 bits, blocks of 64."""
    return quantize_symmetric(weight).dequantize()


VARIANTS: dict[str, tuple[Quantise, Quantise]] = {
    "round to nearest, embedding too": (nearest, nearest),
    "least squares, embedding too": (fitted, fitted),
    "round to nearest, embedding 8 bits": (nearest, eight),
    "least squares, embedding 8 bits": (fitted, eight),
    "offsets, embedding 4 bits": (offsets, fitted),
    "offsets, embedding 8 bits (int4 here)": (offsets, eight),
}


def main() -> None:
    """Compare, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantisation.json")
    options = parser.parse_args()
    logging.disable_progress_bar()
    loaded = load_base(str(model_file()))
    model = loaded.model.eval()
    with (ROOT / "examples" / "data" / "movie.train.csv").open(encoding="utf-8", newline="") as file:
        texts = [TEMPLATE.format(row["text"]) for row in csv.DictReader(file)][: options.texts]
    ids = [torch.tensor([loaded.tokenizer(text).input_ids]) for text in texts]
    words = [loaded.tokenizer(word).input_ids[0] for word in (" positive", " negative")]
    weights = {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() == 2}

    def logits() -> np.ndarray:
        with torch.no_grad():
            return np.stack([model(input_ids=row, logits_to_keep=1).logits[0, -1].numpy() for row in ids])

    def compare(found: np.ndarray) -> dict[str, float]:
        margin = (found[:, words[0]] - found[:, words[1]]) - (truth[:, words[0]] - truth[:, words[1]])
        moved = (found - found.mean(1, keepdims=True)) - (truth - truth.mean(1, keepdims=True))
        return {
            "top1_agreement": float((found.argmax(1) == truth.argmax(1)).mean()),
            "logit_error": float(np.abs(moved).mean()),
            "margin_error": float(np.abs(margin).mean()),
        }

    truth = logits()
    result = {}
    for name, (layers, table) in VARIANTS.items():
        with torch.no_grad():
            for key, value in weights.items():
                model.get_parameter(key).copy_((table if "embed" in key else layers)(value))
        result[name] = compare(logits())
    with load(package("int4")) as runtime:
        result["the int4 package"] = compare(np.stack([runtime.logits(text) for text in texts]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"texts": len(texts), "variants": result}, indent=1) + "\n")
    print("| weights | top-1 agreement | mean logit error | mean margin error |\n|---|---|---|---|")
    for name, row in result.items():
        print(f"| {name} | {row['top1_agreement']:.0%} | {row['logit_error']:.2f} | {row['margin_error']:.2f} |")


if __name__ == "__main__":
    main()
