"""Rows of an encoder in batches."""

from __future__ import annotations

from edgeprompt.engines.encoder.batch import split_batches


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = [5, 90, 6, 91, 5, 4, 88, 300]
    batches = split_batches(lengths, [0] * len(lengths), max_tokens=300)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 300
        assert sum(lengths[index] for index in batch) >= 0.9 * len(batch) * longest
