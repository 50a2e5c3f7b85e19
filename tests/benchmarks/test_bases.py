"""The base of random weights is a file that is read as any other."""

import json
from pathlib import Path

import pytest

from benchmarks.peers.bases import LLAMA, write_llama
from benchmarks.sizes.checkpoints import SIZES
from examples.models import SMOLLM2, model_file

TOKENS = 49_160
"""A few more than the tokenizer has."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "one-layer.gguf"
    write_llama(path, tokenizer=model_file(SMOLLM2), layers=1, vocabulary=TOKENS)
    return path


def test_matrices_have_four_bits_and_every_size_is_the_published_one(file: Path) -> None:
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    sizes = SIZES["llama-3.2-1b"]
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert list(tensors["token_embd.weight"].shape) == [sizes["hidden_size"], TOKENS]
    values = gguf.quants.dequantize(tensors["blk.0.attn_k.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert values.shape == (512, 2048)
    assert values.std() == pytest.approx(0.02, rel=0.05)


def test_its_tokens_are_the_tokenizers(file: Path) -> None:
    import gguf

    field = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"]
    other = gguf.GGUFReader(model_file(SMOLLM2)).fields["tokenizer.ggml.tokens"]
    tokens, those = field.contents(), other.contents()
    assert tokens[: len(those)] == those
    assert len(tokens) == len(set(tokens)) == TOKENS
    assert json.dumps(LLAMA.packages)  # plain values, as a result file takes them
