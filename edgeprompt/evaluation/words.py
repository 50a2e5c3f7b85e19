"""Texts cut into what metrics compare: words, and single characters of scripts that are written without spaces."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator

WORDS = "words"
WORDS_AND_CHARACTERS = "words, and characters of scripts without spaces"

_UNSPACED_LETTERS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u3040-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff"
    "\uff66-\uff9f\U00016fe0-\U00018cff\U0001aff0-\U0001b2ff\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Tai Le, Tai Lue, Tai Tham, Balinese, kana, bopomofo, Han, Yi, Javanese, Tai Viet,
Tangut, Nushu."""
_UNSPACED = re.compile(f"[{_UNSPACED_LETTERS}]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_JOINER = "\u200d"
_JOINERS = ("\u200c", _JOINER)
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_WORD = re.compile("[a-z0-9]+")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokenization(texts: Iterable[str]) -> str:
    """What `words_of` and `squad_words` make of these texts, to be said beside a figure."""
    return WORDS_AND_CHARACTERS if any(_UNSPACED.search(text) for text in texts) else WORDS


def plain(text: str) -> str:
    """A text as it is seen: trimmed, composed (NFC), without marks that are not drawn (direction, byte order)."""
    if text.isascii():
        return text.strip()
    shown = "".join(sign for sign in text if sign in _JOINERS or not _is_format(sign))
    return unicodedata.normalize("NFC", shown.strip())


def _is_format(sign: str) -> bool:
    return unicodedata.category(sign) == "Cf"


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation; of ASCII exactly those of rouge-score's own tokenizer.

    A letter of a script without spaces is a word of its own, with the marks that follow it. So is a symbol beyond ASCII
    (an emoji, with what modifies it and what is joined to it).
    """
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    words: list[str] = []
    inside = joined = False
    for sign in unicodedata.normalize("NFKC", text):
        kind = unicodedata.category(sign)
        if kind == "Cf":  # joiners stand inside words, and between signs that are drawn as one
            joined = sign == _JOINER
            continue
        symbol = kind[0] == "S" and not sign.isascii()
        mark = kind[0] == "M" or sign in _SKIN_TONES or (symbol and joined)
        alone = not mark and (symbol or _UNSPACED.match(sign) is not None)
        joined = False
        if kind[0] not in "LMN" and not symbol:
            inside = False
        elif (inside or mark) and words and not alone:
            words[-1] += sign
        else:
            words.append(sign)
            inside = not alone
    return words


def squad_words(text: str) -> list[str]:
    """Words without case, punctuation and articles (SQuAD's evaluation, Rajpurkar et al. 2016), in every script.

    As MLQA's evaluation (Lewis et al. 2020) has it, punctuation is what Unicode calls so, and each letter of a script
    without spaces is a word, with the marks that follow it.
    """
    bare = text.lower().translate(_ASCII_PUNCTUATION)
    if not bare.isascii():
        bare = unicodedata.normalize("NFKC", bare)
        bare = "".join(sign for sign in bare if unicodedata.category(sign)[0] != "P" and not _is_format(sign))
        bare = "".join(_apart(bare))
    return _ARTICLES.sub(" ", bare).split()


def _apart(text: str) -> Iterator[str]:
    """A text with spaces around each letter of a script without them; the marks that follow stay with their letter."""
    inside = False
    for sign in text:
        letter = _UNSPACED.match(sign) is not None and unicodedata.category(sign)[0] != "M"
        if letter or (inside and unicodedata.category(sign)[0] not in "MC"):
            yield " "
        inside = letter or (inside and unicodedata.category(sign)[0] in "MC")
        yield sign


def bleu_tokenizer(references: Iterable[str]) -> str:
    """sacrebleu's tokenizer that fits: "char" where most letters are kana, Thai or alike, "zh" with Han, else "13a"."""
    letters = han = unspaced = 0
    for text in references:
        if text.isascii():
            letters += sum(map(str.isalpha, text))
            continue
        letters += sum(map(str.isalpha, text))
        han += len(_HAN.findall(text))
        unspaced += len(_UNSPACED.findall(text))
    if unspaced > han and unspaced > letters / 2:
        return "char"
    return "zh" if unspaced else "13a"
