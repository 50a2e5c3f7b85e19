"""Spooled examples, splits and batches."""

from __future__ import annotations

import numpy as np

from edgeprompt.tuning.examples import BatchPlan, Example, Examples, few_shot, sample, sorted_batches, split


def test_examples_come_back_from_disk() -> None:
    made = [Example(list(range(index % 7)), [index % 3, 5], group=index % 3) for index in range(1000)]
    examples = Examples(iter(made))
    assert len(examples) == 1000
    assert [examples[index] for index in range(1000)] == made
    assert examples.lengths.tolist() == [len(example.ids) + 2 for example in made]
    assert examples.groups.tolist() == [index % 3 for index in range(1000)]


def test_memory_stays_small_for_many_examples() -> None:
    import tracemalloc

    tracemalloc.start()
    examples = Examples(Example(list(range(100)), [0]) for _ in range(50_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(examples) == 50_000
    assert peak < 12_000_000  # the ids alone are 20 MB


def test_split_is_a_partition_by_seed() -> None:
    alike = np.full(100, -1, np.int32)
    train, held = split(alike, 0.1, 0)
    assert len(held) == 10
    assert sorted([*train, *held]) == list(range(100))
    assert split(alike, 0.1, 0)[1].tolist() == held.tolist()
    assert split(alike, 0.1, 1)[1].tolist() != held.tolist()
    assert len(split(alike[:3], 0.1, 0)[1]) == 1
    assert len(split(alike[:3], 0.0, 0)[1]) == 0
    assert len(split(alike[:1], 0.5, 0)[0]) == 1


def test_evaluation_gets_its_share_of_every_class_and_never_the_last_of_one() -> None:
    classes = np.repeat(np.arange(6, dtype=np.int32), [1, 1, 2, 10, 30, 56])
    for seed in range(20):
        train, held = split(classes, 0.2, seed)
        assert len(held) == 20
        counts = np.bincount(classes[held], minlength=6)
        assert counts[:2].tolist() == [0, 0]
        assert counts[2] <= 1
        np.testing.assert_allclose(counts[3:], [2, 6, 11], atol=1)
        assert set(classes[train]) == set(range(6))
    assert len(split(np.arange(5, dtype=np.int32), 0.5, 0)[1]) == 0


def test_few_shot_takes_k_of_every_class() -> None:
    classes = np.array([0] * 50 + [1] * 50 + [2] * 2, np.int32)
    train, _ = split(classes, 0.0, 0)
    chosen = few_shot(train, classes, 4, 0)
    assert np.bincount(classes[chosen]).tolist() == [4, 4, 2]
    assert few_shot(train, classes, 4, 1).tolist() != chosen.tolist()
    assert len(sample(train, 10, 0)) == 10


def test_batches_cover_an_epoch_and_are_alike_in_length() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 200, 1003)
    plan = BatchPlan(np.arange(1003), lengths, 16, 7)
    assert plan.batches_per_epoch == 63
    batches = [plan.batch(step) for step in range(63)]
    assert {len(batch) for batch in batches} == {16}
    assert {index for batch in batches for index in batch} == set(range(1003))
    padding = sum(max(lengths[batch]) * 16 - lengths[batch].sum() for batch in batches)
    assert padding < 0.05 * lengths.sum()
    again = BatchPlan(np.arange(1003), lengths, 16, 7)
    assert [again.batch(step) for step in (62, 70, 3)] == [batches[62], plan.batch(70), batches[3]]
    assert BatchPlan(np.arange(1003), lengths, 16, 8).batch(0) != batches[0]
    assert sorted(BatchPlan(np.arange(3), lengths, 16, 0).batch(0)) == [0, 1, 2]


def test_sorted_batches_take_each_once() -> None:
    lengths = np.array([9, 1, 5, 3, 7])
    assert list(sorted_batches(np.array([0, 1, 2, 4]), lengths, 3)) == [[1, 2, 4], [0]]
