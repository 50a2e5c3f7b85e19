from __future__ import annotations

import numpy as np
import pytest

from edgeprompt.errors import TemplateError
from edgeprompt.prompts.verbalizer import AGGREGATIONS, Verbalizer, contextual_calibration, word_tree


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_words_of_a_label_add_up() -> None:
    verbalizer = Verbalizer.compile({"x": ["ab", "c"], "y": ["d"]}, letters)
    assert verbalizer.words == ((97, 98), (99,), (100,))
    found = verbalizer.classification(np.log([0.2, 0.1, 0.15]))
    assert found.logits == pytest.approx({"x": np.log(0.3), "y": np.log(0.15)})
    assert found.scores == pytest.approx({"x": 2 / 3, "y": 1 / 3})
    assert found.label == "x"


def test_calibration_is_subtracted_before_the_decision_and_not_from_the_raw_scores() -> None:
    verbalizer = Verbalizer.compile({"x": ["a"], "y": ["b"]}, letters, calibration=[np.log(0.9), np.log(0.1)])
    found = verbalizer.classification(np.log([0.6, 0.4]))
    assert found.label == "y"
    assert found.scores["y"] == pytest.approx(4 / (4 + 6 / 9))
    assert found.logits["x"] == pytest.approx(np.log(0.6))


def test_calibration_from_content_free_texts_makes_their_mean_flat() -> None:
    raw = np.log([[0.3, 0.1], [0.2, 0.2]])
    prior = contextual_calibration(raw)
    assert prior == pytest.approx(np.log([0.625, 0.375]))


def test_one_word_twice_in_a_label_counts_once() -> None:
    assert len(Verbalizer.compile({"x": ["a", "a"], "y": ["b"]}, letters).words) == 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"x": ["a"]}, "at least two labels"),
        ({"x": ["a"], "y": ["a"]}, "labels 'x' and 'y' share the label word 'a'"),
        ({"x": ["a"], "y": [""]}, "has no tokens"),
    ],
)
def test_useless_verbalizers_are_refused(words: dict[str, list[str]], match: str) -> None:
    with pytest.raises(TemplateError, match=match):
        Verbalizer.compile(words, letters)


def test_word_tree_shares_beginnings() -> None:
    root = word_tree([(1, 2), (1, 3), (1,)])
    assert list(root.children) == [1]
    assert root.children[1].words == [2]
    assert {token: node.words for token, node in root.children[1].children.items()} == {2: [0], 3: [1]}


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("sum", np.log([0.3, 0.15])), ("mean", [np.log([0.2, 0.1]).mean(), np.log(0.15)]), ("max", np.log([0.2, 0.15]))],
)
def test_aggregations(aggregation: str, expected: list[float]) -> None:
    verbalizer = Verbalizer.compile({"x": ["ab", "c"], "y": ["d"]}, letters, [0.5, 0.1], aggregation)
    found = verbalizer.classification(np.log([0.2, 0.1, 0.15]))
    assert list(found.logits.values()) == pytest.approx(list(expected))
    chances = np.exp(np.asarray(expected) - [0.5, 0.1])
    assert list(found.scores.values()) == pytest.approx(chances / chances.sum())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_tuning_aggregates_as_the_runtime_does(aggregation: str) -> None:
    import torch

    from edgeprompt.tuning.verbalizer import LabelWords

    verbalizer = Verbalizer.compile({"x": ["a", "c", "e"], "y": ["d"]}, letters, aggregation=aggregation)
    words = LabelWords(verbalizer)
    logits = torch.randn(2, words.num_positions, 128, generator=torch.Generator().manual_seed(0))
    logarithms = logits.log_softmax(-1)[:, 0].numpy()
    for found, row in zip(words.scores(logits), logarithms, strict=True):
        expected = verbalizer.scores([row[word[0]] for word in verbalizer.words])
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
