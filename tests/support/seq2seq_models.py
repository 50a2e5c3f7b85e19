"""Small random encoder-decoders, one per family, and PEFT adapters for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_T5 = {
    "vocab_size": 512, "d_model": 32, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4,
    "d_kv": 8, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": 512, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 96,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": 0, "scale_embedding": True,
    "init_std": 0.25, "forced_eos_token_id": 0,
}  # fmt: skip
_V11 = {"d_kv": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

_SMALL = {"encoder_layers": 1, "decoder_layers": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("t5", _T5),
    "T5 v1.1, FLAN": ("t5", {**_T5, **_V11, "num_layers": 2, "num_decoder_layers": 2}),
    "mT5": ("mt5", {**_T5, **_V11, "num_layers": 1, "num_decoder_layers": 1}),
    "BART": ("bart", {**_BART, "scale_embedding": False}),
    "mBART": ("mbart", {**_BART, **_SMALL}),
    "Pegasus": ("pegasus", {**_BART, **_SMALL}),
    "Marian": ("marian", {**_BART, **_SMALL, "decoder_vocab_size": 512}),
}
METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")


def save_base(family: str, save_tiny: Callable[..., Path]) -> Path:
    """A transformers folder of a random model; weights are large enough that attention and positions matter."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    model_type, settings = CONFIGS[family]
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **settings))
    if model_type in ("t5", "mt5") and "tie_word_embeddings" in settings:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(512, 32) * 0.3)
    with torch.no_grad():
        if model_type in ("t5", "mt5"):
            # Its own initial size lets a token's embedding drown what attention adds, and a tied head repeat it.
            model.shared.weight.mul_(0.1)
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(0, 1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 0.3)
    folder = save_tiny(model)
    if "tie_word_embeddings" in settings:
        # As the real checkpoints have it; transformers 5 itself writes true for every T5.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def cache_name(family: str) -> str:
    """A package's name in the cache between runs, another for another config (bump v where weights change)."""
    model_type, settings = CONFIGS[family]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"tiny-{model_type}-v2-{digest}"


def peft_model(base: Path, method: str) -> Any:
    """A PEFT model of a base with a random adapter of 5 virtual tokens (multitask: two tasks)."""
    import peft
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    shared = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 5}
    if method == "PREFIX_TUNING":
        heads = getattr(model.config, "num_heads", None) or model.config.decoder_attention_heads
        width = getattr(model.config, "d_kv", model.config.d_model // heads) * heads
        layers = len(getattr(model.get_decoder(), "block", ())) or model.config.decoder_layers
        config = peft.PrefixTuningConfig(**shared, token_dim=width, num_attention_heads=heads, num_layers=layers)
    elif method == "P_TUNING":
        config = peft.PromptEncoderConfig(**shared, encoder_hidden_size=24)
    elif method == "MULTITASK_PROMPT_TUNING":
        config = peft.MultitaskPromptTuningConfig(**shared, num_tasks=2, num_ranks=2)
    else:
        config = peft.PromptTuningConfig(**shared)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for weight in adapted.prompt_encoder.parameters():
            weight.normal_(0, 0.5)
    return adapted
