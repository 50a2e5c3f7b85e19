"""Writes small models as GGUF files, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""Model types that llama.cpp calls otherwise."""


def write_gguf(
    model: Any,
    path: Path,
    *,
    tokenizer: Any = None,
    skip: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    endianess: Any = None,
    part: tuple[int, int] | None = None,
    pre: str | None = "gpt-2",
) -> Path:
    """A decoder or T5 in float32 as a GGUF file.

    Args:
        model: The model.
        path: The file.
        tokenizer: A tokenizers `Tokenizer` with byte-level BPE; None writes none.
        skip: Tensors to leave out, by their GGUF names.
        extra: Further tensors.
        fields: Metadata instead of the model's, by keys without the architecture in front.
        endianess: A `gguf.GGUFEndian`.
        pre: Name of the rule that the tokenizer cuts text by; None writes none.
        part: (number from 0, count): write this part of the tensors alone, with the keys of a split file.
    """
    import gguf

    config = model.config
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind, **({"endianess": endianess} if endianess else {}))
    writer.add_name(config.model_type)
    values = {**_fields(config), **(fields or {})}
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(f"{kind}.{key}", value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, pre)
    tensors = {name: array for name, array in (_tensors(model) | (extra or {})).items() if name not in skip}
    if part is not None:
        number, count = part
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        names = np.array_split(sorted(tensors), count)[number]
        tensors = {str(name): tensors[str(name)] for name in names}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fields(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config: sizes, and few of the values beside them."""
    found = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    for key, name in {
        "context_length": "max_position_embeddings",
        "feed_forward_length": "intermediate_size",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.sliding_window": "sliding_window",
    }.items():
        if name == "sliding_window" and config.model_type not in ("gemma3_text", "phi3"):
            continue
        if getattr(config, name, None) is not None:
            found[key] = getattr(config, name)
    if rope := getattr(config, "rope_parameters", None):
        found["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type == "t5":
        found |= {
            "context_length": 64,
            "feed_forward_length": config.d_ff,
            "attention.key_length": config.d_kv,
            "attention.head_count_kv": config.num_heads,
            "attention.relative_buckets_count": config.relative_attention_num_buckets,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        }
    return found


def _tensors(model: Any) -> dict[str, Any]:
    import gguf

    config = model.config
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    mapping = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
            continue
        if name.endswith("coder.embed_tokens.weight"):  # T5's copies of shared.weight
            continue
        stem, suffix = name.rsplit(".", 1)
        array = weight.float().numpy()
        if "norm" in stem and kind.startswith("gemma"):
            array = array + 1
        if "Conv1D" in str(type(model.get_submodule(stem))) and suffix == "weight":
            array = array.T
        heads = {}
        if kind == "llama":  # llama.cpp rotates neighbours, transformers halves
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in stem:
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        tensors[f"{mapping.get_name(stem)}.{suffix}"] = np.ascontiguousarray(array)
    return tensors


def _add_tokenizer(writer: Any, tokenizer: Any, pre: str | None) -> None:
    import json

    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    writer.add_eos_token_id(0)
