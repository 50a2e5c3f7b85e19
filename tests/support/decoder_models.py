"""Small random decoders, one for each family that can be exported."""

from __future__ import annotations

from typing import Any

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 8},
    "gemma3_text": {**_GROUPED, "sliding_window": 8, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "mpt": {"max_seq_len": 128},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 8, "original_max_position_embeddings": 128},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    # Every fourth layer of SmolLM3 has no positions.
    "smollm3": {"num_key_value_heads": 2, "num_hidden_layers": 5},
}
WINDOWED = ("gemma3_text", "mistral", "phi3")


def tiny_decoder(model_type: str) -> Any:
    """A random model whose logits depend clearly on every input, biases and norms included."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **CONFIGS[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
        else:
            parameter.data *= 3
    return model


def loaded_decoder(model_type: str) -> Any:
    """The same as the exporter sees a base."""
    from edgeprompt.base.families import find_family
    from edgeprompt.base.load import LoadedBase

    return LoadedBase(f"tiny-{model_type}", tiny_decoder(model_type), None, find_family(model_type))
