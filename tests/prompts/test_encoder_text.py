"""Texts and pairs as an encoder's ids, and where each token stands in the text."""

from __future__ import annotations

from pathlib import Path

from edgeprompt.package.folder import open_package
from edgeprompt.prompts.encoder_text import encode_text, first_tokens, words_of
from edgeprompt.prompts.template import Template


def test_pairs_are_joined_as_transformers_joins_them(minilm_package: Path, minilm_folder: Path) -> None:
    from transformers import AutoTokenizer

    want = AutoTokenizer.from_pretrained(minilm_folder)("Who?", "It was I.")
    package = open_package(minilm_package)
    fields = {"question": "Who?", "context": "It was I."}
    vocab = package.manifest.geometry.vocab_size
    found = encode_text(
        Template.parse("{prompt}{question}{context}"),
        package.tokenizer,
        fields,
        num_virtual_tokens=2,
        first_virtual_id=vocab,
        locate="context",
    )
    assert found.ids == [vocab, vocab + 1, *want["input_ids"]]
    assert found.type_ids == [0, 0, *want["token_type_ids"]]
    pieces = [fields["context"][span[0] : span[1]] for span in found.offsets if span]
    assert pieces == ["It", "was", "I", "."]


def test_offsets_stay_inside_the_slot(minilm_package: Path) -> None:
    found = encode_text(
        Template.parse("{prompt}Tag this: {text} end"),
        open_package(minilm_package).tokenizer,
        {"text": "Ada Lovelace wrote"},
        num_virtual_tokens=1,
        first_virtual_id=40000,
        locate="text",
    )
    pieces = ["Ada Lovelace wrote"[span[0] : span[1]] for span in found.offsets if span]
    assert "".join(pieces) == "AdaLovelacewrote"
    words = words_of("Ada Lovelace wrote")
    starts = [found.offsets[token][0] for token in first_tokens(words, found.offsets) if token is not None]  # type: ignore[index]
    assert starts == [0, 4, 13]
