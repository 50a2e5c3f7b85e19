from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgeprompt.decoding.drafts import MOST, USUAL, PromptLookup, StepCosts

TOKENS = ["the", " Hague", " court", ",", " said", " the", " hague", ".", " Q", "ue", "stion", " question", " new", "?"]
NUMBER = {token: at for at, token in enumerate(TOKENS)}


def letters(ids: Sequence[int]) -> list[str]:
    return ["".join(filter(str.isalnum, TOKENS[token].casefold())) for token in ids]


def ids(*tokens: str) -> list[int]:
    return [NUMBER[token] for token in tokens]


def drafted(text: list[int], answer: list[int], most: int = MOST) -> list[str]:
    found, right = PromptLookup(text, letters).draft(answer, most)
    assert 0 < right <= 1
    return [TOKENS[token] for token in found]


def test_what_followed_the_same_tokens() -> None:
    text = ids("the", " Hague", " court", ",", " said", " the", " hague", ".")
    found = drafted(text, ids(" new", " Hague", " court", ","))
    assert found == [" said", " the", " hague", ".", " new", " Hague", " court"]
    assert drafted(text, ids(" new", " Hague", " court"), most=2) == [",", " said"]


def test_the_last_occurrence_is_the_one_that_counts() -> None:
    text = ids(" court", " said", " new", " court", " said", " question")
    assert drafted(text, ids(" court", " said"))[0] == " question"


def test_case_and_punctuation_and_other_tokens_do_not_matter() -> None:
    text = ids("the", " hague", " court", " said", " question", " new")
    assert drafted(text, ids(" the", " Hague"))[:2] == [" court", " said"]
    # A comma that the text has not is followed by the text's next word, and a word in other tokens by the word behind.
    assert drafted(text, ids(" the", " Hague", " court", ","))[0] == " said"
    assert drafted(text, ids(" Q", "ue", "stion"))[0] == " new"
    # The text's own comma is not drafted a second time.
    assert drafted(ids(" court", ",", " said"), ids(" court", "?"))[0] == " said"


def test_nothing_is_drafted_where_nothing_was_said_before() -> None:
    assert drafted(ids("the", " court"), ids("?")) == []
    assert drafted([], ids("?")) == []
    # "que" ends inside " question": there is no token to go on with.
    assert drafted(ids("the", " question", " new"), ids(" Q", "ue")) == []


def test_the_share_of_right_tokens_is_learnt_without_checking_them() -> None:
    text = ids("the", " Hague", " court", " said", " new", " question", ".", "?")
    copied, other = PromptLookup(text, letters), PromptLookup(text, letters)
    for end in range(3, len(text)):
        _, high = copied.draft(text[:end])
    answer = text[:3]
    for wrong in ids("?", ".", "?", "."):
        answer += [wrong, *text[:3]]
        for end in range(len(answer) - 3, len(answer) + 1):
            _, low = other.draft(answer[:end])
    assert low < high
    assert high > 0.9


def test_costs_are_guessed_until_they_are_measured() -> None:
    costs = StepCosts(USUAL)
    assert costs.cost(8) / costs.cost(2) == pytest.approx(USUAL[8] / USUAL[2])
    costs.add(4, 0.010)
    assert costs.cost(2) == pytest.approx(0.010 * USUAL[2] / USUAL[4])
    for seconds in (0.002, 0.002, 0.9):  # one that was disturbed
        costs.add(2, seconds)
    assert costs.cost(2) == 0.002


def measured(**seconds: float) -> StepCosts:
    costs = StepCosts(USUAL)
    for _ in range(3):
        for name, value in seconds.items():
            costs.add(int(name.removeprefix("of")), value)
    return costs


def test_the_width_is_the_one_that_pays() -> None:
    steep = measured(of2=1.0, of4=1.5, of8=2.5)
    assert steep.choose(0, 0.0, 100) == 2
    assert steep.choose(7, 0.1, 100) == 2
    assert steep.choose(7, 0.8, 100) == 4
    assert steep.choose(7, 0.95, 100) == 8
    assert steep.choose(7, 0.95, 7) == 4
    assert steep.choose(7, 0.95, 2) == 2
    flat = measured(of2=1.0, of4=0.8, of8=1.0)
    assert flat.choose(0, 0.0, 100) == 4
    assert flat.choose(7, 0.8, 100) == 8


def test_each_width_of_a_plain_step_is_tried_at_first_and_again_later() -> None:
    costs, chosen = StepCosts(USUAL), []
    for _ in range(200):
        width = costs.choose(0, 0.0, 100)
        costs.add(width, {2: 1.0, 4: 2.0, 8: 3.0}[width])
        chosen.append(width)
    assert chosen[:6] == [2, 2, 2, 4, 4, 4]
    assert 1 <= chosen[6:].count(4) <= 4
    assert 8 not in chosen
