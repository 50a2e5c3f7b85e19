"""Metrics of texts in any script, and the numbers of before in Latin."""

import random

import pytest

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
