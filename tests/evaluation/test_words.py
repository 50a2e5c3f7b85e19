"""Metrics of texts in any script, and the numbers of before in Latin."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprompt.errors import InputError
from edgeprompt.evaluation.metrics import score
from edgeprompt.evaluation.words import bleu_tokenizer, squad_words, words_of

# (text, one that shares some of it, one that shares nothing)
SCRIPTS = {
    "chinese": ("今天天气很好，我们去公园。", "今天很好", "猫在睡觉"),
    "japanese": ("私は東京に住んでいます。", "東京に住む", "ねこ"),
    "korean": ("오늘 날씨가 정말 좋다.", "오늘 날씨가 나쁘다", "고양이"),
    "thai": ("วันนี้อากาศดีมาก", "อากาศดี", "แมว"),
    "arabic": ("الطقس جميل اليوم، شكرا", "الطقس اليوم", "قطة"),
    "hindi": ("आज मौसम अच्छा है।", "आज मौसम खराब है", "बिल्ली"),
    "cyrillic": ("Сегодня хорошая погода.", "сегодня плохая погода", "кошка"),
    "greek": ("Ο καιρός είναι καλός σήμερα.", "ο καιρός", "γάτα"),
}


@pytest.mark.parametrize("metric", ["rouge", "f1", "exact-match", "bleu"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_text_against_itself_is_right_and_against_a_part_in_between(metric, script):
    text, part, other = SCRIPTS[script]
    assert score(metric, [text], [text]).value == pytest.approx(1.0)
    assert score(metric, [other], [text]).value < 0.35
    if metric in ("rouge", "f1"):
        assert 0.2 < score(metric, [part], [text]).value < 0.95


def test_the_result_says_how_texts_were_cut():
    assert score("rouge", ["今天"], ["今天"]).tokenizer == "words, and characters of scripts without spaces"
    assert score("f1", ["a cat"], ["a cat"]).tokenizer == "words"
    assert score("exact-match", ["今"], ["今"]).tokenizer == ""
    wanted = {"chinese": "zh", "japanese": "char", "thai": "char"}
    assert {script: bleu_tokenizer(texts[:1]) for script, texts in SCRIPTS.items()} == {
        script: wanted.get(script, "13a") for script in SCRIPTS
    }


def test_words_of_scripts():
    assert words_of("我爱 Python3！") == ["我", "爱", "python3"]
    assert words_of("Сегодня, Привет_мир") == ["сегодня", "привет", "мир"]
    assert words_of("मौसम अच्छा है।") == ["मौसम", "अच्छा", "है"]
    assert words_of("café ＡＢ") == ["café", "ab"]
    assert squad_words("「東京」、です。") == ["東", "京", "で", "す"]
    assert squad_words("The “cat”, а кот") == ["cat", "а", "кот"]


def test_latin_is_cut_as_before():
    import re
    import string

    from rouge_score.tokenizers import DefaultTokenizer

    chosen = random.Random(0)
    theirs = DefaultTokenizer(use_stemmer=False)
    for _ in range(300):
        text = "".join(chosen.choices(string.printable, k=40)) + " The cat's a well-known U.S. thing_1"
        assert words_of(text) == theirs.tokenize(text)
        bare = text.lower().translate(str.maketrans("", "", string.punctuation))
        assert squad_words(text) == re.sub(r"\b(a|an|the)\b", " ", bare).split()


LETTERS = {
    "thai": (0x0E01, 0x0E2F), "lao": (0x0E94, 0x0EA1), "khmer": (0x1780, 0x17B3), "burmese": (0x1000, 0x1021),
    "tibetan": (0x0F40, 0x0F48), "balinese": (0x1B13, 0x1B34), "javanese": (0xA984, 0xA9B3),
    "tai tham": (0x1A20, 0x1A53), "yi": (0xA000, 0xA48C), "han": (0x4E00, 0x9FFF), "hiragana": (0x3042, 0x3094),
    "half-width kana": (0xFF71, 0xFF9D), "arabic": (0x0627, 0x063B),
    "hebrew": (0x05D0, 0x05EB), "devanagari": (0x0915, 0x093A), "tamil": (0x0BAE, 0x0BBA),
    "hangul": (0xAC00, 0xD7A3), "cyrillic": (0x0430, 0x0450), "ethiopic": (0x1200, 0x1207), "emoji": (0x1F600, 0x1F64F),
    "latin": (0x61, 0x7B),
}  # fmt: skip
WITHOUT_SPACES = {
    "thai", "lao", "khmer", "burmese", "tibetan", "balinese", "javanese", "tai tham", "yi", "han", "hiragana",
    "half-width kana",
}  # fmt: skip


@pytest.mark.parametrize("spans", [False, True])
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_text_is_one_against_itself_and_zero_against_other_letters(spans, data):
    script = data.draw(st.sampled_from(sorted(LETTERS)))
    first, last = LETTERS[script]
    half = (first + last) // 2

    def text(low, high):
        return st.text(st.characters(min_codepoint=low, max_codepoint=high), min_size=2, max_size=8)

    # No article is among the texts.
    one, other = (
        data.draw(text(*ends).filter(lambda t: t not in ("an", "a"))) for ends in ((first, half - 1), (half, last - 1))
    )
    mixed = f"{one} and 日本 {other}"
    for metric in ("rouge", "f1"):
        if spans and metric == "rouge":
            continue
        for whole in (one, mixed):
            assert score(metric, [whole], [whole], spans=spans).value == pytest.approx(1.0)
        assert score(metric, [other], [one], spans=spans).value == 0.0
        found = score(metric, [one + other], [one], spans=spans)
        if script in WITHOUT_SPACES:
            assert 0.0 < found.value < 1.0
            assert found.tokenizer == "words, and characters of scripts without spaces"


def test_marks_are_no_letters_and_punctuation_is_compared_as_it_is():
    # The two Khmer words share one mark, and no letter.
    assert score("f1", ["ខ្មែរ"], ["ល្បែង"]).value == 0.0
    assert squad_words("ថ្ងៃ") == ["ថ្", "ងៃ"]
    assert words_of("👍🏽👨‍👩‍👧 ❤️ok") == ["👍🏽", "👨👩👧", "❤\ufe0f", "ok"]
    for metric in ("rouge", "f1"):
        assert score(metric, ["👍🔥"], ["👍🔥"]).value == 1.0
        assert score(metric, ["?!", "...", ""], ["?!", "?!", "?!"]).value == pytest.approx(1 / 3)
    assert score("rouge", ["👍"], ["👍🔥"]).value == pytest.approx(2 / 3)
    assert score("f1", ["..."], ["the"], spans=True).value == 1.0  # as SQuAD's own evaluation


@pytest.mark.parametrize("metric", ["rouge", "f1", "exact-match", "bleu"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u200fالطقس جميل اليوم شكرا", "الطقس جميل اليوم شكرا"),  # marks of direction, as keyboards and chats put them
        ("\ufefffour words in Latin, é", "four words in Latin, é"),
        ("un cafe\u0301 au lait du matin", "un café au lait du matin"),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8 사람 하나 둘 셋", "한국 사람 하나 둘 셋"),
    ],
)
def test_what_looks_the_same_is_the_same(metric, one, other):
    for spans in (False, True) if metric in ("f1", "exact-match") else (False,):
        assert score(metric, [one], [other], spans=spans).value == pytest.approx(1.0)
        assert score(metric, [other], [one], spans=spans).value == pytest.approx(1.0)


def test_bleu_of_texts_too_short_for_it_is_refused_and_not_zero():
    for text in ("yes", "the cat", "今天", "안녕하세요"):
        with pytest.raises(InputError, match="runs of 4 tokens, and no reference has as many"):
            score("bleu", [text], [text])
    assert score("bleu", ["yes", "one two three four"], ["yes", "one two three four"]).value == pytest.approx(1.0)
    assert score("bleu", ["yes"], ["one two three four"]).value == 0.0
