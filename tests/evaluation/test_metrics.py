"""Metrics against hand counts and against the libraries that people compare with."""

import collections
import math
import random
import re
import string

import pytest

from edgeprompt.errors import DataError, InputError
from edgeprompt.evaluation.metrics import default_metric, score

LABELS = ("positive", "negative", "neutral")


def drawn(n, seed=0):
    draw = random.Random(seed)
    truth = [draw.choice(LABELS) for _ in range(n)]
    return [label if draw.random() < 0.7 else draw.choice(LABELS) for label in truth], truth


def test_accuracy_has_binomial_error_and_a_table():
    found = score("accuracy", ["a", "a", "b", "b"], ["a", "b", "b", "b"], labels=True)
    assert found.value == 0.75
    assert found.n == 4
    assert math.isclose(found.standard_error, math.sqrt(0.75 * 0.25 / 3))
    assert found.per_label["b"].precision == 1.0
    assert math.isclose(found.per_label["b"].recall, 2 / 3)
    assert found.per_label["a"].n == 1


def test_macro_f1_is_sklearns_and_its_error_has_the_right_size():
    from sklearn.metrics import f1_score

    guesses, truth = drawn(400)
    found = score("f1", guesses, truth, labels=True)
    assert math.isclose(found.value, f1_score(truth, guesses, average="macro"))
    # The spread of macro F1 over independent draws of the same process.
    others = [score("f1", *drawn(400, seed), labels=True).value for seed in range(1, 60)]
    mean = sum(others) / len(others)
    spread = math.sqrt(sum((value - mean) ** 2 for value in others) / (len(others) - 1))
    assert 0.6 < found.standard_error / spread < 1.6


def test_sets_of_labels_are_right_as_a_whole_and_counted_one_by_one():
    guesses, truth = [{"a"}, {"a", "b"}, set()], [{"a"}, {"a"}, {"b"}]
    found = score("accuracy", list(map(frozenset, guesses)), list(map(frozenset, truth)), labels=True)
    assert found.value == pytest.approx(1 / 3)
    assert (found.per_label["a"].f1, found.per_label["b"].f1, found.per_label["b"].n) == (1.0, 0.0, 1)


def test_mean_absolute_error_is_in_the_unit_of_the_numbers():
    found = score("mae", ["1.5", "-2"], ["1", "2"])
    assert found.value == 2.25
    assert found.standard_error == pytest.approx(1.75)
    with pytest.raises(DataError, match="'good' is right"):
        score("mae", ["1"], ["good"])


def test_a_label_nobody_has_scores_zero():
    found = score("f1", ["c", "a"], ["a", "a"], labels=True)
    assert math.isclose(found.value, (2 / 3 + 0) / 2)


def test_exact_match_trims_and_word_f1_ignores_articles_and_case():
    assert score("exact-match", [" Paris\n", "Rome"], ["Paris", "rome"]).value == 0.5
    assert score("f1", ["The Eiffel tower!"], ["eiffel Tower"]).value == 1.0
    assert math.isclose(score("f1", ["the big red dog"], ["a red cat"]).value, 2 * 1 / (3 + 2))
    assert score("f1", [""], ["something"]).value == 0.0


def squad_normalised(text):
    """`normalize_answer` of SQuAD's evaluate-v2.0.py, word for word."""

    def remove_articles(text):
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(text.lower())))


def squad_f1(a_gold, a_pred):
    """`compute_f1` of SQuAD's evaluate-v2.0.py."""
    gold_toks, pred_toks = squad_normalised(a_gold).split(), squad_normalised(a_pred).split()
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def squad_figures(predictions, answers):
    """Mean EM and F1 as `get_raw_scores` of SQuAD's evaluate-v2.0.py has them."""
    exact, f1 = [], []
    for a_pred, texts in zip(predictions, answers, strict=True):
        gold_answers = [text for text in texts if squad_normalised(text)] or [""]
        exact.append(max(int(squad_normalised(a) == squad_normalised(a_pred)) for a in gold_answers))
        f1.append(max(squad_f1(a, a_pred) for a in gold_answers))
    return sum(exact) / len(exact), sum(f1) / len(f1)


def test_answers_to_questions_score_as_in_squads_script():
    answers = [
        ("Denver Broncos", "The Denver Broncos", "the Broncos"),
        ("in 1066", "1066"),
        ("",),
        ("the", "The Hague"),
        ("Saint-Denis, France",),
        ("a",),
    ]
    predictions = ["the denver broncos!", "the year 1066", "", "Hague", "Saint Denis", "nothing"]
    draw = random.Random(0)
    words = ["the", "a", "Broncos", "1066", "in", "France,", "", "Hague", "U.S."]
    for _ in range(200):
        answers.append(tuple(" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))))
        predictions.append(" ".join(draw.choices(words, k=draw.randint(0, 4))))
    exact, f1 = squad_figures(predictions, answers)
    assert 0.05 < exact < f1 < 0.9
    assert score("exact-match", predictions, answers, spans=True).value == pytest.approx(exact)
    assert score("f1", predictions, answers, spans=True).value == pytest.approx(f1)


def test_several_right_answers_count_for_every_metric_of_texts():
    import sacrebleu

    guesses = ["the cat sat on the mat", "a dog runs in the park today"]
    answers = [("no", "the cat sat on the mat"), ("a dog ran in the park today",)]
    assert score("exact-match", guesses, answers).value == 0.5
    assert score("rouge", guesses, answers).value == pytest.approx((1 + 6 / 7) / 2)
    streams = [["no", answers[1][0]], [answers[0][1], None]]
    assert score("bleu", guesses, answers).value == pytest.approx(sacrebleu.corpus_bleu(guesses, streams).score / 100)


def test_rouge_is_the_longest_common_subsequence():
    found = score("rouge", ["the cat sat", "x"], ["the cat lay", "y"])
    assert math.isclose(found.value, (2 / 3 + 0) / 2)


def test_bleu_is_sacrebleus():
    import sacrebleu

    guesses = ["the cat sat on the mat", "a dog runs in the park today"] * 10
    truth = ["the cat sat on a mat", "a dog ran in the park today"] * 10
    found = score("bleu", guesses, truth)
    assert math.isclose(found.value, sacrebleu.corpus_bleu(guesses, [truth]).score / 100)
    assert 0 < found.standard_error < 0.1
    assert score("bleu", ["x"], ["four completely different words"]).value == 0.0


@pytest.mark.parametrize(
    ("metric", "guesses", "truth", "labels", "kind", "words"),
    [
        ("precision", ["a"], ["a"], True, InputError, "'precision' is not one of accuracy, f1"),
        ("accuracy", ["a"], ["a"], False, InputError, "accuracy is for labels"),
        ("rouge", [], [], False, DataError, "0 predictions"),
        ("rouge", ["a"], ["a", "b"], False, DataError, "1 predictions and 2 references"),
    ],
)
def test_refusals(metric, guesses, truth, labels, kind, words):
    with pytest.raises(kind, match=words):
        score(metric, guesses, truth, labels=labels)


def test_defaults():
    assert [default_metric(task) for task in ("classify", "generate", "qa")] == ["accuracy", "rouge", "f1"]
