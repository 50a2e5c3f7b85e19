from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from edgeprompt.arrays import log_softmax
from edgeprompt.decoding.sampling import DEFAULT_NEW_TOKENS, Sampler, Sampling, resolve
from edgeprompt.errors import EdgePromptError, InputError
from edgeprompt.request import GenerationOptions, Request

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def frequencies(draws: int = 4000, **options: float) -> dict[int, float]:
    sampler = Sampler(Sampling(temperature=options.pop("temperature", 1.0), seed=0, **options))
    counts = Counter(sampler(LOGITS) for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


def test_greedy_is_the_largest_logit() -> None:
    assert Sampler(Sampling())(LOGITS) == 0
    assert Sampler(Sampling())(LOGITS, allowed=[3, 2, 4]) == 2


def test_plain_sampling_follows_the_distribution() -> None:
    assert frequencies() == pytest.approx({0: 0.4, 1: 0.3, 2: 0.15, 3: 0.1, 4: 0.05}, abs=0.03)


def test_temperature_sharpens() -> None:
    weights = np.array([0.4, 0.3, 0.15, 0.1, 0.05]) ** 2
    expected = dict(enumerate(weights / weights.sum()))
    assert frequencies(temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_k_and_renormalises() -> None:
    assert frequencies(top_k=2) == pytest.approx({0: 4 / 7, 1: 3 / 7}, abs=0.03)
    assert set(frequencies(top_k=50)) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    assert set(frequencies(top_p=0.4 - 1e-3)) == {0}
    assert set(frequencies(top_p=0.6)) == {0, 1}
    assert set(frequencies(top_p=0.86)) == {0, 1, 2, 3}


def test_min_p_is_relative_to_the_largest() -> None:
    assert set(frequencies(min_p=0.3)) == {0, 1, 2}


def test_top_p_over_a_flat_large_vocabulary_equals_a_full_sort() -> None:
    logits = np.random.default_rng(0).normal(0, 0.1, 20_000).astype(np.float32)
    chances = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-chances)
    kept = set(order[: int(np.searchsorted(np.cumsum(chances[order]), 0.5)) + 1].tolist())
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.5, seed=1))
    drawn = {sampler(logits) for _ in range(300)}
    assert drawn <= kept
    assert len(drawn) > 250


def test_same_seed_same_tokens_whatever_happens_between() -> None:
    one, two = (Sampler(Sampling(temperature=1.0, seed=7)) for _ in range(2))
    other = Sampler(Sampling(temperature=1.0, seed=8))
    first = [one(LOGITS) for _ in range(20)]
    second = []
    for _ in range(20):
        other(LOGITS)
        second.append(two(LOGITS))
    assert first == second


def test_repetition_penalty_as_in_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.array([2.0, -1.0, 1.9, 0.5], np.float32)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0, 1]]), torch.tensor(logits)[None])[0].numpy()
    sampler = Sampler(Sampling(repetition_penalty=1.3), history=[0, 1])
    assert sampler(logits) == int(expected.argmax()) == 2
    assert sampler._penalised(logits)[:2] == pytest.approx(expected[:2])
    assert logits[0] == 2.0  # the graph's buffer is untouched
    assert 2 in sampler._seen  # what was generated counts too


def test_allowed_ids_are_drawn_by_their_share() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = Counter(sampler(LOGITS, allowed=[4, 3]) for _ in range(3000))
    assert counts[3] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert set(counts) == {3, 4}


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-45])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    assert {sampler(LOGITS) for _ in range(20)} == {0}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.5}])
def test_nan_is_no_answer(options: dict[str, float]) -> None:
    logits = LOGITS.copy()
    logits[3] = np.nan
    with pytest.raises(EdgePromptError, match="logits are NaN"):
        Sampler(Sampling(**options))(logits)
    with pytest.raises(EdgePromptError, match="logits are NaN"):
        log_softmax(logits)


def test_log_softmax() -> None:
    assert log_softmax(LOGITS + 100) == pytest.approx(LOGITS, abs=1e-5)


def test_resolve_takes_the_request_then_the_prompt_then_the_library() -> None:
    found = resolve(GenerationOptions(top_k=5), {"top_k": 9, "temperature": 0.5, "stop": ["\n"]})
    assert (found.top_k, found.temperature, found.stop, found.max_new_tokens) == (5, 0.5, ("\n",), DEFAULT_NEW_TOKENS)
    assert not found.asked_length
    assert resolve(GenerationOptions(stop="END"), {}).stop == ("END",)  # type: ignore[arg-type]
    assert resolve(GenerationOptions(), {"stop": "END"}).stop == ("END",)
    assert resolve(GenerationOptions(), {"max_new_tokens": 3}).asked_length


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number between 0 and 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "it must be an integer"),
        ({"top_k": True}, "top_k is True"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("",)}, "stop takes texts of at least one character"),
        ({"stop": 5}, "stop is 5; it must be a list of texts"),
        ({"choices": (3,)}, "choices takes texts"),
        ({"choices": "yes"}, "choices is 'yes'; it must be a list of texts"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        resolve(GenerationOptions(**options), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", [[], ()])
def test_no_choices_are_refused(empty: Any) -> None:
    """Before, an empty list generated freely."""
    with pytest.raises(InputError, match="choices is empty"):
        resolve(GenerationOptions(choices=empty), {})
    assert resolve(GenerationOptions(), {}).choices == ()


def test_a_mask_is_no_list_of_ids() -> None:
    """Before, True was id 1."""
    for mask in ([True, False], [5, True], np.ones(3, bool)):
        with pytest.raises(InputError, match="input_ids must be integers"):
            Request(input_ids=mask)
