"""Writes a base of a published model's true sizes with random weights, shard by shard, in little memory.

    python -m benchmarks.sizes.checkpoints llama-3.2-1b FOLDER [--dtype bf16] [--shard-gb 2] [--seed 0]

Its config is the published one, its matrices are normal with a deviation of 0.02, norms are near one, biases small. Its
tokenizer is trained on the example texts, so that real text can be read. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.base.families import find_family

SIZES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "smollm3-3b": {
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 65536, "rope_theta": 5000000.0, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    },
    "opt-125m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
    },
    "pythia-160m": {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048, "rotary_pct": 0.25,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    },
    "bloom-560m": {
        "model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "phi-3-mini": {
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False,
    },
    "t5-base": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
        "num_heads": 12, "feed_forward_proj": "relu", "tie_word_embeddings": True,
    },
    "flan-t5-base": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12,
        "num_heads": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "bart-base": {
        "model_type": "bart", "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_attention_heads": 12,
        "decoder_attention_heads": 12, "max_position_embeddings": 1024,
    },
    "bert-base": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
    },
    "albert-base": {
        "model_type": "albert", "vocab_size": 30000, "embedding_size": 128, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
    },
    "roberta-base": {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "modernbert-base": {
        "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22,
        "num_attention_heads": 12, "intermediate_size": 1152, "max_position_embeddings": 8192, "local_attention": 128,
    },
    "deberta-v3-base": {
        "model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 0,
        "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "layer_norm_eps": 1e-7,
    },
}  # fmt: skip
"""Published configs, as far as they differ from what transformers takes for granted."""
TEXTS = Path(__file__).resolve().parents[2] / "examples" / "data"
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_DEVIATION = 0.02
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
_CLASSES = {
    names.DECODER_ONLY: "AutoModelForCausalLM",
    names.ENCODER_DECODER: "AutoModelForSeq2SeqLM",
    names.ENCODER_ONLY: "AutoModelForMaskedLM",
}
_SPECIAL = {
    "bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>",
    "mask_token": "<mask>",
}  # fmt: skip


def main() -> None:
    """Write one checkpoint, and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="Most gigabytes of a shard.")
    parser.add_argument("--layers", type=int, help="Fewer layers than the model has.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    count = write_checkpoint(
        given.name, given.folder, dtype=given.dtype, shard_bytes=int(given.shard_gb * 1e9), layers=given.layers,
        seed=given.seed,
    )  # fmt: skip
    print(f"{given.folder}: {count / 1e9:.2f} billion parameters of {given.dtype}")


def write_checkpoint(
    name: str,
    folder: Path,
    *,
    dtype: str = "bf16",
    shard_bytes: int = 2_000_000_000,
    layers: int | None = None,
    seed: int = 0,
) -> int:
    """Write config, tokenizer and shards into a new folder; returns the number of parameters.

    Args:
        name: Of `SIZES`.
        folder: Must not exist, or be empty.
        dtype: Of `DTYPES`.
        shard_bytes: Most of a shard; a tensor larger than that has one of its own.
        layers: Instead of the model's own number.
        seed: Of the random numbers.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty")
    config = make_config(name, layers)
    config.dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    with torch.device("meta"):
        model = getattr(transformers, _CLASSES[architecture_of(name)]).from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _write_tokenizer(folder, name)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    if SIZES[name].get("tie_word_embeddings") is False and "lm_head.weight" not in shapes:
        shapes["lm_head.weight"] = shapes["shared.weight"]  # transformers ties the two heads of every T5
    width = 4 if dtype == "fp32" else 2
    shards = list(_shards(shapes, width, shard_bytes))
    weight_map = {}
    generator = torch.Generator().manual_seed(seed)
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(keys, file)
        _write_shard(folder / file, {key: shapes[key] for key in keys}, dtype, generator)
    total = sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total * width}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def architecture_of(name: str) -> str:
    """Of a name in `SIZES`: one of `edgeprompt.names.ARCHITECTURES`."""
    return str(find_family(SIZES[name]["model_type"]).architecture)


def make_config(name: str, layers: int | None = None) -> Any:
    """The transformers config of a name in `SIZES`."""
    from transformers import AutoConfig

    facts = dict(SIZES[name])
    kind = facts.pop("model_type")
    if layers is not None:
        facts |= {key: layers for key in facts if key in _LAYERS}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    if architecture_of(name) != names.DECODER_ONLY:
        tokens = {"bos_token_id": 0, "cls_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    if architecture_of(name) == names.ENCODER_DECODER:
        tokens |= {"decoder_start_token_id": 1}
    return AutoConfig.for_model(kind, **tokens, **facts)


def _shards(shapes: Mapping[str, tuple[int, ...]], width: int, most: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for key, shape in shapes.items():
        bytes_of = math.prod(shape) * width
        if shard and size + bytes_of > most:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += bytes_of
    yield shard


def _write_shard(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, generator: Any) -> None:
    """A safetensors file, its header first: the format needs no tensor in memory but the one that is written."""
    import torch

    width, at, header = 4 if dtype == "fp32" else 2, 0, {}
    for key, shape in shapes.items():
        end = at + math.prod(shape) * width
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for key, shape in shapes.items():
            rows = max(1, (1 << 24) // max(1, math.prod(shape[1:])))
            for start in range(0, shape[0], rows):
                part = (min(rows, shape[0] - start), *shape[1:])
                values = torch.randn(part, generator=generator) * _DEVIATION
                if len(shape) == 1 and not key.endswith("bias") and "gemma" not in file.parent.name:
                    values += 1
                out.write(values.to(kind).view(torch.uint8).numpy().tobytes())


def _write_tokenizer(folder: Path, name: str) -> None:
    """Byte-level BPE of 8,000 pieces, trained on the example texts: as many tokens a text as real models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    decoder = architecture_of(name) == names.DECODER_ONLY
    special = {"bos_token": "<s>", "eos_token": "<s>"} if decoder else _SPECIAL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=[*dict.fromkeys(special.values())], initial_alphabet=letters,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((file.read_text("utf-8") for file in sorted(TEXTS.glob("*.train.csv"))), trainer)
    if not decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


if __name__ == "__main__":
    main()
