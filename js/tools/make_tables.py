"""Write `src/tokenizer/tables.ts`: what Python's `tokenizers` makes of every code point.

The library's Unicode tables are of several ages (BERT's are those of Unicode 8, its normal forms those of Unicode 12),
and none is the browser's. So they are read off the library itself, code point by code point.

    python js/tools/make_tables.py
"""

from __future__ import annotations

import base64
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
TARGET = Path(__file__).resolve().parent.parent / "src/tokenizer/tables.ts"


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def encode_set(codes: Iterable[int]) -> str:
    """Alternating lengths of what is out and what is in, as variable-length integers in base64."""
    runs: list[int] = []
    last = 0
    for code in sorted(codes):
        if runs and last == code:
            runs[-1] += 1
        else:
            runs += [code - last, 1]
        last = code + 1
    return base64.b64encode(b"".join(map(varint, runs))).decode()


def encode_map(pairs: dict[int, str]) -> str:
    """Pairs "code point -> one other" as differences; neighbours with one difference and stride are one entry."""
    entries: list[list[int]] = []
    for code, text in sorted(pairs.items()):
        assert len(text) == 1
        shift = ord(text) - code
        if entries:
            first, count, stride, known = entries[-1]
            gap = code - (first + (count - 1) * stride)
            if known == shift and ((count == 1 and gap in (1, 2)) or (count > 1 and gap == stride)):
                entries[-1] = [first, count + 1, gap, known]
                continue
        entries.append([code, 1, 1, shift])
    data, last = b"", 0
    for first, count, stride, shift in entries:
        data += (
            varint(first - last) + varint(count * 2 + stride - 1) + varint(shift * 2 if shift >= 0 else -shift * 2 - 1)
        )
        last = first
    return base64.b64encode(data).decode()


def pieces(splitter: pre_tokenizers.PreTokenizer, text: str) -> int:
    """How many pieces a text is split into."""
    return len(splitter.pre_tokenize_str(text))


def main() -> None:
    """Probe the library and write the tables."""
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    letters = [c for c in CODES if pieces(bytelevel, "a" + chr(c)) == 1]
    numbers = [c for c in CODES if pieces(bytelevel, "1" + chr(c)) == 1]
    # " " sticks to what is neither a space: "!" + c in one piece: c is other than letter, number, space
    spaces = [c for c in set(CODES) - set(letters) - set(numbers) if pieces(bytelevel, "!" + chr(c)) == 2]
    split = pre_tokenizers.Split(Regex(r"\p{L}+"), "removed")
    split_letters = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    split = pre_tokenizers.Split(Regex(r"\p{N}+"), "removed")
    split_numbers = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    split = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    split_spaces = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    assert split_letters == letters, (len(split_letters), len(letters))
    assert split_numbers == numbers
    print("spaces", sorted(map(hex, spaces)), "split", split_spaces == sorted(spaces), file=sys.stderr)
    split = pre_tokenizers.Split(Regex(r"\p{M}+"), "removed")
    marks = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    split = pre_tokenizers.Split(Regex(r"\p{P}+"), "removed")
    split_punctuation = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    split = pre_tokenizers.Split(Regex(r"\p{S}+"), "removed")
    symbols = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    split = pre_tokenizers.Split(Regex(r"\p{Lu}+"), "removed")
    upper = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    split = pre_tokenizers.Split(Regex(r"\p{Ll}+"), "removed")
    lower_case = [c for c in CODES if not split.pre_tokenize_str(chr(c))]
    word = pre_tokenizers.Whitespace()
    words = [c for c in CODES if pieces(word, "a" + chr(c)) == 1 and word.pre_tokenize_str(chr(c))]
    clean = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False
    )
    control = [c for c in CODES if clean.normalize_str(chr(c)) == ""]
    blank = [c for c in CODES if clean.normalize_str(chr(c)) == " "]
    odd = [c for c in CODES if clean.normalize_str(chr(c)) not in ("", " ", chr(c))]
    assert not odd
    chinese = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    han = [c for c in CODES if chinese.normalize_str(chr(c)) == f" {chr(c)} "]
    bert = pre_tokenizers.BertPreTokenizer()
    punctuation = [c for c in CODES if pieces(bert, "a" + chr(c) + "b") == 3]
    bert_spaces = [c for c in CODES if not bert.pre_tokenize_str(chr(c))]
    print("bert spaces", sorted(map(hex, bert_spaces)), "blank", sorted(map(hex, blank)), file=sys.stderr)
    digit = pre_tokenizers.Digits(individual_digits=True)
    digits = [c for c in CODES if pieces(digit, "a" + chr(c) + "b") == 3]
    strip = normalizers.StripAccents()
    accents = [c for c in CODES if strip.normalize_str(chr(c)) == ""]
    stripped = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False
    )
    nonspacing = [c for c in CODES if stripped.normalize_str(chr(c)) == ""]
    low = normalizers.Lowercase()
    lower = {c: low.normalize_str(chr(c)) for c in CODES if low.normalize_str(chr(c)) != chr(c)}
    print("long lower", {hex(c): t for c, t in lower.items() if len(t) > 1}, file=sys.stderr)
    forms = {"NFD": normalizers.NFD(), "NFKD": normalizers.NFKD(), "NFC": normalizers.NFC(), "NFKC": normalizers.NFKC()}
    # What takes part in normal forms behind another character: it decomposes, is reordered, or joins what is before.
    # A non-starter between "a", a dot below (220) and a cedilla's kin is moved; so is a mark around it.
    active = set()
    nfkd, nfkc = forms["NFKD"], forms["NFKC"]
    for c in CODES:
        t = chr(c)
        if (
            nfkd.normalize_str(t) != t
            or nfkc.normalize_str(t) != t
            or any(nfkd.normalize_str(x) != x for x in ("\u0345" + t, t + "\u0334"))
            or (unicodedata.combining(t) and nfkd.normalize_str("\u0345" + t) != "\u0345" + t)
        ):
            active.add(c)
    for c in CODES:  # second parts of compositions that are starters themselves (vowel signs, Hangul)
        decomposed = forms["NFD"].normalize_str(chr(c))
        if len(decomposed) > 1 and forms["NFC"].normalize_str(decomposed) == chr(c):
            active.update(map(ord, decomposed[1:]))
    canonical_only = [c for c in sorted(active) if forms["NFD"].normalize_str(chr(c)) != chr(c)]
    print("active", len(active), "canonical", len(canonical_only), file=sys.stderr)
    tables = {
        "LETTERS": letters,
        "NUMBERS": numbers,
        "MARKS": marks,
        "PUNCTUATION_REGEX": split_punctuation,
        "SYMBOLS": symbols,
        "UPPER": upper,
        "LOWER_CASE": lower_case,
        "WORDS": words,
        "DIGITS": digits,
        "BERT_CONTROL": control,
        "BERT_PUNCTUATION": punctuation,
        "BERT_HAN": han,
        "ACCENTS": accents,
        "NONSPACING": nonspacing,
        "NORMAL_FORMS": active,
    }
    lines = ["// Written by js/tools/make_tables.py from Python's tokenizers; do not edit.", ""]
    for name, codes in tables.items():
        text = encode_set(codes)
        print(name, len(set(codes)), len(text), file=sys.stderr)
        lines += [f"export const {name} =", f'  "{text}";']
    # Combining classes never change (Unicode's stability policy), so Python's serve for what the library knows.
    classes = {c: chr(c + unicodedata.combining(chr(c))) for c in active if unicodedata.combining(chr(c))}
    lines += ["export const COMBINING =", f'  "{encode_map(classes)}";']
    text = encode_map({c: t for c, t in lower.items() if len(t) == 1})
    print("LOWERCASE", len(lower), len(text), file=sys.stderr)
    lines += ["export const LOWERCASE =", f'  "{text}";']
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
