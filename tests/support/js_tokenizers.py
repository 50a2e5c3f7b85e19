# ruff: noqa: E501
"""Tokenizers of every kind that packages have, and what Python's `tokenizers` makes of many texts, for the JS tests."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def real_texts() -> list[str]:
    texts = []
    for name in ("movie", "source", "restore"):
        with (ROOT / f"examples/data/{name}.test.csv").open(encoding="utf-8", newline="") as file:
            texts += [value for row in csv.DictReader(file) for value in row.values() if len(value) > 20]
    for page in sorted((ROOT / "docs").glob("*.md")):
        texts += [line for line in page.read_text("utf-8").splitlines() if line.strip()]
    return texts


def fuzzed(generator: random.Random, real: list[str]) -> str:
    """A text of real words, odd characters and what tokenizers trip over."""
    pools = [
        lambda: chr(generator.randrange(0x20, 0x7F)),
        lambda: chr(generator.randrange(0x80, 0x250)),
        lambda: chr(generator.choice((generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)))),
        lambda: chr(generator.randrange(0x300, 0x370)),
        lambda: chr(
            generator.choice([0x85, 0xA0, 0x1680, 0x2028, 0x3000, 0xFEFF, 0x200B, 0x200D, 0xFE0F, 0xAD, 0, 9, 10])
        ),
        lambda: chr(generator.randrange(0x1F300, 0x1FAFF)),
        lambda: chr(generator.randrange(0x4E00, 0x9FFF)),
        lambda: chr(generator.randrange(0xAC00, 0xD7A3)),
        lambda: chr(generator.randrange(0x1100, 0x1200)),
        lambda: generator.choice(
            ["'s", "'LL", "'ſ", "ΑΣ", "ας", "İ", "ß", "ﬁ", "e\u0301", "\u0344", "\u1e9b\u0323", "१२", "½"]
        ),
        lambda: generator.choice(["  ", "   ", "\n\n", "\r\n", "\t ", " ", " ", " "]),
        lambda: generator.choice(
            [*SPECIALS, "[CLS]", "[MASK]", "<|im_start|>", "<|endoftext|>", "▁", "Ġ", "##", "<0x41>"]
        ),
        lambda: " " + generator.choice(generator.choice(real).split() or ["a"]),
        lambda: str(generator.randrange(10 ** generator.randrange(1, 12))),
    ]
    chosen = generator.sample(pools, generator.randrange(1, len(pools)))
    return "".join(generator.choice(chosen)() for _ in range(generator.randrange(0, 40)))


def make_tokenizers(real: list[str]) -> dict[str, Tokenizer]:
    found: dict[str, Tokenizer] = {}

    def bpe(name: str, normalizer: Any, splitter: Any, post: Any, decoder: Any, **options: Any) -> None:
        tokenizer = Tokenizer(models.BPE(**options))
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = splitter
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "byte" in name else []
        tokenizer.train_from_iterator(
            real,
            trainers.BpeTrainer(
                vocab_size=800, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
            ),
        )
        if post:
            tokenizer.post_processor = post
        tokenizer.decoder = decoder
        found[name] = tokenizer

    level = pre_tokenizers.ByteLevel
    roberta = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    bpe("bytes-roberta", None, level(add_prefix_space=False), roberta, decoders.ByteLevel())
    bpe(
        "bytes-prefix-space",
        None,
        level(add_prefix_space=True),
        processors.ByteLevel(trim_offsets=True),
        decoders.ByteLevel(),
    )
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), level(add_prefix_space=False, use_regex=False)]
    )
    template = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 0)])
    bpe(
        "bytes-llama3",
        normalizers.NFC(),
        split,
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        decoders.ByteLevel(),
    )
    smol = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)])
    bpe("bytes-digits-few", None, smol, None, decoders.ByteLevel())
    few = json.loads(found["bytes-digits-few"].to_str())
    for char in ("ÿ", "Ģ", "ł", "Ń", "Â", "ð"):  # bytes missing from the vocabulary, as SmolLM2's
        few["model"]["vocab"].pop(char, None)
    few["model"]["merges"] = [m for m in few["model"]["merges"] if not set("".join(m)) & set("ÿĢłŃÂð")]
    found["bytes-digits-few"] = Tokenizer.from_str(json.dumps(few))
    llama2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = llama2
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        real,
        trainers.BpeTrainer(
            vocab_size=1200, special_tokens=SPECIALS + byte_tokens, show_progress=False, limit_alphabet=120
        ),
    )
    tokenizer.decoder, tokenizer.post_processor = back, template
    found["llama2-fallback"] = tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        real, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS, limit_alphabet=60, show_progress=False)
    )
    found["bpe-unknown"] = tokenizer
    for name, normalizer, splitter in (
        ("unigram-metaspace", None, pre_tokenizers.Metaspace()),
        (
            "unigram-nfkc-first",
            normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
        ),
        (
            "unigram-words",
            normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
            pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
            ),
        ),
    ):
        tokenizer = Tokenizer(models.Unigram())
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = splitter
        tokenizer.train_from_iterator(
            real,
            trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False),
        )
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
        found[name] = tokenizer
    for name, options in (
        ("wordpiece-uncased", {"lowercase": True}),
        ("wordpiece-cased", {"lowercase": False, "strip_accents": False}),
    ):
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(**options)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(
            real, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False)
        )
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
        tokenizer.add_tokens([AddedToken("plot twist", single_word=True), AddedToken("Łódź", normalized=True)])
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=False)])
        found[name] = tokenizer
    return found


def utf16(text: str) -> list[int]:
    places = [0]
    for char in text:
        places.append(places[-1] + (2 if ord(char) > 0xFFFF else 1))
    return places


def answers(tokenizer: Tokenizer, text: str) -> list[Any]:
    found = tokenizer.encode(text)
    bare = tokenizer.encode(text, add_special_tokens=False)
    places = utf16(text)
    offsets = [place for low, high in found.offsets for place in (places[low], places[high])]
    return [
        text,
        found.ids,
        offsets,
        bare.ids,
        tokenizer.decode(bare.ids),
        tokenizer.decode(found.ids, skip_special_tokens=False),
    ]


def write_cases(out: Path, count: int, given: dict[str, Path]) -> list[Path]:
    """A file for each tokenizer with `count` fuzzed texts, real ones, pairs, and code points (all from 10,000 texts on)."""
    generator, real = random.Random(19), real_texts()
    found = make_tokenizers(real)
    for name, path in given.items():
        found[name] = Tokenizer.from_file(str(path))
        found[name].no_padding()
        found[name].no_truncation()
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, tokenizer in found.items():
        texts = generator.sample(real, min(len(real), count // 4)) + [fuzzed(generator, real) for _ in range(count)]
        cases = [answers(tokenizer, text) for text in texts]
        pairs = [pair(tokenizer, generator.choice(real), fuzzed(generator, real)) for _ in range(20)]
        every = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
        asked = every if count >= 10_000 else [code for code in every if code < 0x250 or code % 97 == 0]
        encodings = tokenizer.encode_batch([f"a{chr(code)}b" for code in asked], add_special_tokens=False)
        codes = [[code, one.ids] for code, one in zip(asked, encodings, strict=True)]
        text = json.dumps({"tokenizer": json.loads(tokenizer.to_str()), "cases": cases, "pairs": pairs, "codes": codes})
        files.append(out / f"{name}.json")
        files[-1].write_text(text, "utf-8")
    return files


def pair(tokenizer: Tokenizer, first: str, second: str) -> list[Any]:
    """Two texts, and what they are together."""
    both = tokenizer.encode(first, second)
    places = {0: utf16(first), 1: utf16(second)}
    offsets = [
        place
        for sequence, (low, high) in zip(both.sequence_ids, both.offsets, strict=True)
        for place in ([0, 0] if sequence is None else [places[sequence][low], places[sequence][high]])
    ]
    return [first, second, both.ids, offsets, both.type_ids, both.sequence_ids]
