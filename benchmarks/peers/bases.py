"""The bases that are compared: two files that people download, and one of the size that people deploy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sizes.checkpoints import SIZES
from examples.models import GEMMA3, SMOLLM2, model_file

FILE, EIGHT, LARGE_BLOCKS = "gguf", "int8", "int4-128"
"""Packages: the file's own blocks, int8, and 4 bits in blocks of 128."""
PACKAGES: dict[str, dict[str, Any]] = {
    FILE: {"precision": "gguf"},
    EIGHT: {"precision": "int8", "allow_quality_loss": True},
    LARGE_BLOCKS: {"precision": "int4", "block_size": 128, "allow_quality_loss": True},
}
"""How each is exported. A table says what it loses."""


@dataclass(frozen=True)
class Base:
    """A base, and how much work each peer does with it."""

    name: str
    title: str
    new_tokens: int = 64
    texts: int = 6
    snippets: int = 256
    packages: dict[str, dict[str, Any]] = field(default_factory=lambda: PACKAGES)

    def file(self, folder: Path) -> Path:
        """The GGUF file; that of random weights is written into `folder` on first use."""
        if self.name != LLAMA.name:
            return model_file({"smollm2": SMOLLM2, "gemma3": GEMMA3}[self.name])
        path = folder / "llama-1.24b-q4_0.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_llama(partial, tokenizer=model_file(SMOLLM2))
            partial.replace(path)
        return path


LLAMA = Base("llama-1b", "Llama of 1.24 B parameters, random weights, Q4_0", new_tokens=32, texts=3, snippets=48)
BASES = (
    Base("smollm2", "SmolLM2-135M-Instruct, Q4_1"),
    Base("gemma3", "Gemma 3 270M, Q4_K_M"),
    LLAMA,
)


def write_llama(
    path: Path, *, tokenizer: Path, layers: int | None = None, vocabulary: int | None = None, seed: int = 0
) -> None:
    """A Llama of the sizes of Llama-3.2-1B with random weights, matrices in Q4_0, the embedding in Q8_0.

    One tensor is in memory at a time.

    Args:
        path: The new file.
        tokenizer: A GGUF file of a byte-level BPE, whose tokens are taken; the rest of the vocabulary is never used.
        layers: Instead of the model's own number.
        vocabulary: Likewise, tokens.
        seed: Of the random numbers.
    """
    import gguf

    facts = dict(SIZES["llama-3.2-1b"])
    facts["num_hidden_layers"] = layers or facts["num_hidden_layers"]
    facts["vocab_size"] = vocabulary or facts["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("llama-3.2-1b-random")
    writer.add_block_count(facts["num_hidden_layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(facts["hidden_size"])
    writer.add_feed_forward_length(facts["intermediate_size"])
    writer.add_head_count(facts["num_attention_heads"])
    writer.add_head_count_kv(facts["num_key_value_heads"])
    writer.add_key_length(facts["head_dim"])
    writer.add_value_length(facts["head_dim"])
    writer.add_rope_dimension_count(facts["head_dim"])
    writer.add_rope_freq_base(facts["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(facts["vocab_size"])
    _copy_tokenizer(writer, tokenizer, facts["vocab_size"])
    shapes = dict(_shapes(facts))
    kinds = {name: _kind(name, shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        size = _bytes(shape, kinds[name])
        stored = gguf.quant_shape_to_byte_shape(shape, kinds[name]) if len(shape) > 1 else shape
        dtype = np.dtype(np.uint8 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(name, stored, dtype, size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        if len(shape) == 1:
            writer.write_tensor_data(values + 1)
        else:
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    writer.close()


def _shapes(facts: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head = facts["hidden_size"], facts["intermediate_size"], facts["head_dim"]
    keys = facts["num_key_value_heads"] * head
    yield "token_embd.weight", (facts["vocab_size"], hidden)
    for layer in range(facts["num_hidden_layers"]):
        here = f"blk.{layer}"
        yield f"{here}.attn_norm.weight", (hidden,)
        yield f"{here}.attn_q.weight", (facts["num_attention_heads"] * head, hidden)
        yield f"{here}.attn_k.weight", (keys, hidden)
        yield f"{here}.attn_v.weight", (keys, hidden)
        yield f"{here}.attn_output.weight", (hidden, facts["num_attention_heads"] * head)
        yield f"{here}.ffn_norm.weight", (hidden,)
        yield f"{here}.ffn_gate.weight", (inner, hidden)
        yield f"{here}.ffn_up.weight", (inner, hidden)
        yield f"{here}.ffn_down.weight", (hidden, inner)
    yield "output_norm.weight", (hidden,)


def _kind(name: str, shape: tuple[int, ...]) -> Any:
    from gguf import GGMLQuantizationType as Kind

    if len(shape) == 1:
        return Kind.F32
    return Kind.Q8_0 if name.startswith("token_embd") else Kind.Q4_0


def _bytes(shape: tuple[int, ...], kind: Any) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _copy_tokenizer(writer: Any, source: Path, size: int) -> None:
    """The tokens, merges and kinds of another file, filled up to `size` with tokens that no text has."""
    import gguf

    fields = gguf.GGUFReader(source).fields
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    kinds = list(fields["tokenizer.ggml.token_type"].contents())
    more = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list([*tokens, *(f"[PAD{number}]" for number in range(more))])
    writer.add_token_types([*kinds, *[int(gguf.TokenType.UNUSED)] * more])
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(int(fields["tokenizer.ggml.bos_token_id"].contents()))
    writer.add_eos_token_id(int(fields["tokenizer.ggml.eos_token_id"].contents()))
    writer.add_add_bos_token(False)
