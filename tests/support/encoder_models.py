"""Small random encoders, one per family, with their masked-language-model heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_BERT = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 96, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0,
    "sep_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", _BERT),
    "RoBERTa": ("roberta", {**_BERT, "type_vocab_size": 1, "max_position_embeddings": 98}),
    "DistilBERT": (
        "distilbert",
        {
            **{name: _BERT[name] for name in ("vocab_size", "max_position_embeddings", "pad_token_id")},
            "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "initializer_range": 0.2,
        },
    ),
    "ELECTRA": ("electra", {**_BERT, "embedding_size": 64}),
    "ELECTRA, small": ("electra", {**_BERT, "embedding_size": 32}),
    "ALBERT": ("albert", {**_BERT, "embedding_size": 32}),
    "MPNet": ("mpnet", _BERT),
    "DeBERTa-v2, v3": (
        "deberta-v2",
        {
            **_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
            "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
            "pooler_hidden_size": 64,
        },
    ),
    "ModernBERT": (
        "modernbert",
        {**_BERT, "local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 3, "norm_eps": 1e-5},
    ),
}  # fmt: skip


def save_base(family: str, save_tiny: Callable[..., Path]) -> Path:
    """A transformers folder of a random masked language model; biases and positions are large enough to matter."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining

    model_type, settings = CONFIGS[family]
    torch.manual_seed(0)
    kind = AutoModelForPreTraining if model_type in ("bert", "albert") else AutoModelForMaskedLM
    model = kind.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" not in name.lower():
                weight.normal_(0, 0.1)
            elif "relative_attention_bias" in name:
                weight.normal_(0, 1)
    return save_tiny(model)


def cache_name(family: str) -> str:
    """A family as part of a file name."""
    return "encoder-" + "".join(letter if letter.isalnum() else "-" for letter in family.lower())
