"""What cells mean, and refusals that name the row where that is not certain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import (
    given_answer,
    given_answers,
    joined_words,
    known_label,
    label_of,
    labels_of,
    number_of,
    tagged_words,
    text_of,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (3, "3"),
        (True, "True"),
        (0.5, "0.5"),
        (np.int64(3), "3"),
        (np.str_("a"), "a"),
        ("\ufeffa", "a"),
        ("a\r\nb\rc\r", "a\nb\nc\n"),
        (" kept ", " kept "),
    ],
)
def test_cells_as_text(value: Any, text: str) -> None:
    assert text_of({"x": value}, "x", "row 1") == text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"x": [1]}, "row 1: column 'x' holds a list"),
        ({"y": "a"}, "row 1 has no column 'x'; it has y"),
        ({"x": None, "y": "a"}, r"row 1 has nothing in column 'x' \(None\)"),
        ({"x": float("nan")}, r"row 1 has nothing in column 'x' \(nan\)"),
        ({"x": "a\0b"}, "row 1: column 'x' holds NUL"),
        ({"x": "a\ud800b"}, "row 1: column 'x' holds half of a surrogate pair"),
    ],
)
def test_cells_that_are_no_text(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_of(record, "x", "row 1")


@pytest.mark.parametrize(
    ("value", "label"),
    [("positive ", "positive"), (1, "1"), (1.0, "1"), (0.5, "0.5"), ("1.0", "1.0"), (True, "True"), ("\ufeffa", "a")],
)
def test_labels_have_no_white_space_around_and_numbers_one_form(value: Any, label: str) -> None:
    assert label_of({"label": value}, "label", "row 1") == label


@pytest.mark.parametrize(
    "value", [None, float("nan"), float("inf"), "", "  ", ["a"], "[1, 0, 1]", "['a', 'b']", {}, "nan", "<NA>"]
)
def test_what_is_no_label_names_its_row(value: Any) -> None:
    with pytest.raises(DataError, match="row 7"):
        label_of({"label": value}, "label", "row 7")


@pytest.mark.parametrize(
    "value", ["[1 0 1]", "[1. 0.\n 1.]", "(1, 0, 1)", "('a', 'b')", "{'a'}", "{'a': 1}", "array([1, 0])", "tensor([1])"]
)
def test_what_a_program_printed_is_no_label(value: str) -> None:
    for read in (label_of, labels_of):
        with pytest.raises(DataError, match="row 7"):
            read({"label": value}, "label", "row 7")
    for label in ("(positive)", "[drama]", "{x}", "(1)", "[-", "None"):
        assert label_of({"label": label}, "label", "row 7") == label


def test_several_labels() -> None:
    assert labels_of({"label": ["war ", "drama", "war"]}, "label", "row 1") == ["war", "drama"]
    assert labels_of({"label": "war, drama"}, "label", "row 1") == ["war", "drama"]
    assert labels_of({"label": []}, "label", "row 1") == []
    assert labels_of({"label": ""}, "label", "row 1") == []


@pytest.mark.parametrize(
    "value",
    [
        *([1, 0, 1], [0, 3], [1.0, 0.0], [True, False], np.array([1, 0]), ["a", None], [["a"]], "[1, 0, 1]", None),
        *("1,0,1", "0, 1", ["1", "0", "1"], ["0", "0"], "0.0,1.0", ["True", "False"], np.array(["1", "0"]), "a,nan"),
    ],
)
def test_what_may_be_ids_or_zeros_and_ones_is_refused_with_the_row(value: Any) -> None:
    with pytest.raises(DataError, match="row 3"):
        labels_of({"label": value}, "label", "row 3")


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", "good", True, None, [1.0], "1e999"])
def test_numbers_are_finite(value: Any) -> None:
    assert number_of({"label": " 1.5"}, "label", "row 2") == 1.5
    with pytest.raises(DataError, match="row 2"):
        number_of({"label": value}, "label", "row 2")


def test_tags_have_names_and_two_spellings_of_their_column() -> None:
    wanted = (["Anna", "met"], ["B-PER", "O"])
    assert tagged_words({"tokens": wanted[0], "tags": wanted[1]}, "row 1") == wanted
    assert tagged_words({"tokens": wanted[0], "ner_tags": wanted[1]}, "row 1") == wanted
    assert tagged_words({"tokens": "Anna met", "tags": "B-PER O"}, "row 1") == wanted
    assert joined_words({"tokens": ["Anna", "met"]}, "row 1") == "Anna met"
    with pytest.raises(DataError, match="row 1: column 'ner_tags' holds 3, an id without a name"):
        tagged_words({"tokens": ["Anna"], "ner_tags": [3]}, "row 1")
    with pytest.raises(DataError, match="row 1 has nothing in column 'tags'"):
        tagged_words({"tokens": ["Anna"], "tags": None}, "row 1")


@pytest.mark.parametrize("tags", ["['O', 'B-X']", "[0, 1]", "1 0", ["1", "0"]])
def test_tags_that_are_a_printed_list_or_ids_are_refused(tags: Any) -> None:
    with pytest.raises(DataError, match=r"list written as text|id without a name"):
        tagged_words({"tokens": "a b", "tags": tags}, "row 1")


@pytest.mark.parametrize("start", ["x", None, 1.5, float("inf"), float("nan"), -3])
def test_an_answer_starts_at_a_whole_number(start: Any) -> None:
    with pytest.raises(DataError, match="row 1: answer_start holds"):
        given_answer({"answers": {"text": ["cat"], "answer_start": [start]}}, "the cat", "row 1")


def test_an_answer_stands_where_the_context_as_it_was_written_has_it() -> None:
    raw = "\ufeffOne.\r\nAnna met Anna."
    context = text_of({"context": raw}, "context", "row 1")
    second = raw.rindex("Anna")
    for answers in (
        {"text": ["Anna"], "answer_start": [second]},
        [{"text": "Anna", "answer_start": second}],
    ):
        answer, start = given_answer({"context": raw, "answers": answers}, context, "row 1")
        assert (answer, start) == ("Anna", context.rindex("Anna"))
    assert given_answer({"context": raw, "answers": {"text": [], "answer_start": []}}, context, "row 1") == ("", 0)
    assert given_answer({"context": raw, "answers": []}, context, "row 1") == ("", 0)


def test_a_label_is_known_by_what_it_means() -> None:
    assert known_label("1", ("0.0", "1.0")) == "1.0"
    assert known_label("positive", ("positive ",)) == "positive "
    assert known_label("Positive", ("positive",)) is None


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        ({"text": ["1066", "in 1066", "1066"], "answer_start": [3, 0, 3]}, ("1066", "in 1066")),
        ([{"text": "1066", "answer_start": 3}, {"text": "in 1066", "answer_start": 0}], ("1066", "in 1066")),
        ({"text": [], "answer_start": []}, ("",)),
        ([], ("",)),
    ],
)
def test_all_of_squads_answers_are_right(answers, texts):
    assert given_answers({"context": "in 1066", "answers": answers}, "in 1066", "row 1") == texts
    assert given_answers({"context": "in 1066", "answer": "1066"}, "in 1066", "row 1") == ("1066",)


def test_an_answer_to_a_question_that_has_none_is_refused() -> None:
    record = {"answers": {"text": ["abc"], "answer_start": [0]}, "is_impossible": True}
    with pytest.raises(DataError, match=r"row 1 says that it has no answer \(is_impossible\), and gives 'abc'"):
        given_answer(record, "abc", "row 1")
    assert given_answer({**record, "answers": {"text": [], "answer_start": []}}, "abc", "row 1") == ("", 0)


def test_large_numbers_are_told_apart() -> None:
    assert known_label(str(2**53), [str(2**53 + 1)]) is None
    assert known_label("007.50", ["+7.5"]) == "+7.5"
    assert known_label("\uff11", ["1"]) == "1"


def test_ids_of_tags_with_a_fraction_or_a_sign_are_ids() -> None:
    for tag in ("1.0", "-100"):
        with pytest.raises(DataError, match="an id without a name"):
            tagged_words({"tokens": ["a"], "tags": [tag]}, "row 1")
