"""Label words in their place behind a text, with small tokenizers of each kind."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgeprompt.prompts.template import Template
from edgeprompt.prompts.verbalizer import Verbalizer, ids_alone, ids_behind, text_before_words

TEXTS = Path(__file__).parents[2] / "examples/data/source.train.csv"
WORDS = (" good", " bad", " very good actors", "good", " 1", "\nYes")
ENDS = ("\nA:", "It was", "Sentiment:", ".", "a story ")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with TEXTS.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:400]


def byte_level(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return tokenizer


def prepended(texts: list[str]) -> Tokenizer:
    """As Llama 2's: the normalizer prepends a space and replaces all of them, nothing is split before the merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"]))
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def unigram(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


def split_at_white_space(texts: list[str]) -> Tokenizer:
    """As T5's and XLM-R's: white space at the ends is cut off, so a line break alone has no tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


KINDS: tuple[Callable[[list[str]], Tokenizer], ...] = (byte_level, prepended, unigram, split_at_white_space)


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_has_the_tokens_of_the_whole_text(kind: Any, texts: list[str]) -> None:
    encode = encoder(kind(texts))
    for end in ENDS:
        for word in WORDS:
            text, whole = encode(f"the film was fine {end}"), encode(f"the film was fine {end}{word}")
            if whole[: len(text)] != text:
                continue  # the tokenizer joins them, so the whole text has no tokens of the word alone
            assert text + ids_behind(encode, end, word) == whole, (end, word)


def test_a_line_break_that_is_cut_off_still_parts_words(texts: list[str]) -> None:
    """The word was taken for one that follows its text without a space."""
    encode = encoder(split_at_white_space(texts))
    for word in ("good", "news", " good"):
        assert encode("A fine film.\n") + ids_behind(encode, "\n", word) == encode(f"A fine film.\n{word}")


def test_a_word_encoded_alone_has_tokens_that_no_text_has(texts: list[str]) -> None:
    encode = encoder(prepended(texts))
    whole = encode("It was good")
    assert whole[-1:] == ids_behind(encode, "It was", " good")
    assert encode(" good") != ids_behind(encode, "It was", " good")


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_that_is_a_text_of_its_own_has_one_space_in_front(kind: Any, texts: list[str]) -> None:
    """An encoder-decoder's answer: Llama 2's kind of tokenizer puts a space in front of the word's own."""
    encode = encoder(kind(texts))
    assert ids_alone(encode, "good") == encode("good")
    assert ids_alone(encode, " good") == ids_behind(encode, "It was", " good")
    words = Verbalizer.compile({"good": (" good",), "bad": (" bad",)}, encode).words
    assert [list(ids) for ids in words] == [ids_behind(encode, "It was", word) for word in (" good", " bad")]


@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_text_that_is_not_known(kind: Any, texts: list[str]) -> None:
    encode = encoder(kind(texts))
    assert ids_behind(encode, "", " good") == ids_behind(encode, "It was", " good")


def test_a_verbalizer_stands_behind_its_template(texts: list[str]) -> None:
    encode = encoder(prepended(texts))
    words = {"good": (" good",), "bad": (" bad",)}
    template = Template.parse("{prompt}{text}\nIt was")
    assert text_before_words(template) == "\nIt was"
    found = Verbalizer.compile(words, encode, behind=text_before_words(template))
    start = encode("the film\nIt was")
    assert [start + list(ids) for ids in found.words] == [
        encode(f"the film\nIt was{word}") for word in (" good", " bad")
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{prompt}{text}", ""), ("{text} It was{mask}.", " It was"), ("{mask}{text}", ""), ("{text}\nA:", "\nA:")],
)
def test_text_before_words(template: str, expected: str) -> None:
    assert text_before_words(Template.parse(template)) == expected
