"""Texts of any length: answered, or one line; memory of an encoder's attention is bounded by what is free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import edgeprompt
from edgeprompt import EngineOptions, GenerationOptions, Request
from edgeprompt.engines.seq2seq import lane
from edgeprompt.errors import CapacityError, EdgePromptError, InputError
from edgeprompt.ort import free_memory

OPTIONS = EngineOptions(provider="cpu", threads=1, spinning=False)
MEGABYTE = "the film was good " * 58_000


@pytest.mark.parametrize("kind", ["T5", "BART", "encoder", "decoder"])
def test_a_text_of_a_megabyte_is_one_line(
    kind: str,
    seq2seq_package: Callable[..., Path],
    encoder_package: Callable[..., Path],
    tiny_llama_package: Path,
) -> None:
    """Before, T5 asked ONNX Runtime for terabytes and ended in its error."""
    path = {"encoder": lambda: encoder_package("BERT"), "decoder": lambda: tiny_llama_package}.get(
        kind, lambda: seq2seq_package(kind)
    )()
    with edgeprompt.load(path, options=OPTIONS) as runtime:
        request = Request(MEGABYTE, task="embed" if kind == "encoder" else "generate")
        error = CapacityError if kind == "T5" else InputError
        with pytest.raises(error, match="tokens") as caught:
            runtime.run([request])
        assert "\n" not in str(caught.value)
        short = Request("the film", task=request.task, options=GenerationOptions(max_new_tokens=1))
        assert runtime.run([short])


def test_free_memory_bounds_the_text(seq2seq_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with edgeprompt.load(seq2seq_package("T5"), options=OPTIONS) as runtime:
        text = "the film was good " * 600
        tokens = len(runtime.embed([text], pooling="cls")) and len(runtime.tokenizer.encode(text))
        heads = runtime._package.manifest.geometry.num_attention_heads
        needed = free_memory.attention_bytes(tokens, heads)
        monkeypatch.setattr(free_memory, "free_memory", lambda: needed - 1)
        with pytest.raises(CapacityError, match=f"has {tokens} tokens"):
            runtime.embed([text])
        monkeypatch.setattr(free_memory, "free_memory", lambda: None)  # not known
        assert len(runtime.embed([text])) == 1
        long = runtime.run([Request(text, task="embed"), Request("a", task="embed")], return_errors=True)
        assert not any(isinstance(one, EdgePromptError) for one in long)


@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_long_texts_are_encoded_in_pieces(
    kind: str, seq2seq_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = lane.Seq2SeqGraphs.encode
    monkeypatch.setattr(
        lane.Seq2SeqGraphs, "encode", lambda self, rows: (sizes.append(len(rows)), encode(self, rows))[1]
    )
    with edgeprompt.load(seq2seq_package(kind), options=OPTIONS) as runtime:
        texts = [f"the film {number} " + "was good " * number for number in range(12)]
        asked = [Request(text, options=GenerationOptions(max_new_tokens=4)) for text in texts]
        expected = [runtime.run([one])[0].token_ids for one in asked]
    sizes.clear()
    monkeypatch.setattr(lane, "ATTENTION_BUDGET", 4 * free_memory.attention_bytes(24, 4))
    with edgeprompt.load(seq2seq_package(kind), options=OPTIONS) as runtime:
        assert [found.token_ids for found in runtime.run(asked)] == expected
    assert sum(sizes) == len(texts)
    assert 1 in sizes
    assert max(sizes) > 1
