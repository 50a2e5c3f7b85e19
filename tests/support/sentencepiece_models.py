"""Small SentencePiece models, trained as the ones of public families were."""

from __future__ import annotations

import csv
import functools
import io
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "examples/data"
_LLAMA = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "split_digits": True,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "albert": {
        "model_type": "unigram", "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1,
        "control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]"],
        "normalization_rule_name": "nmt_nfkc_cf",
    },
    "xlmr": {"model_type": "unigram", "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "llama": {**_LLAMA, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "llama with a table": {
        **_LLAMA, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "normalization_rule_name": "nmt_nfkc",
    },
    "gemma": {
        **_LLAMA, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False,
        "user_defined_symbols": ["<mask>", "\n\n", "<b>"],
    },
}  # fmt: skip


@functools.cache
def train(kind: str, more: tuple[str, ...] = (), size: int = 480) -> bytes:
    """The model file of a kind in `SETTINGS`, of `size` pieces; `more`: texts besides, whose letters it has."""
    import sentencepiece

    texts = []
    for name in ("source", "movie"):
        with (DATA / f"{name}.train.csv").open(encoding="utf-8", newline="") as file:
            texts += [row["text"] for row in csv.DictReader(file)]
    texts += more
    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=found, vocab_size=size, minloglevel=2, **SETTINGS[kind],
        **({"character_coverage": 1.0} if more else {}),
    )  # fmt: skip
    return found.getvalue()
