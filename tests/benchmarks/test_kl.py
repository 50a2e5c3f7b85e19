"""Quality beside the peers: what is compared, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.float_bases import _off_grid
from benchmarks.quality.kl import OUT, table


def test_floats_lie_off_the_grid_and_near_it() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (40, 64)).astype(np.float32)
    codes.reshape(40, 2, 32)[..., :2] = 0, 15
    moved = _off_grid(codes * 0.25, 15, random)
    assert np.array_equal(np.round(moved / 0.25), codes)
    assert np.abs(moved / 0.25 - codes).mean() == pytest.approx(0.25, abs=0.02)


def test_the_table_in_the_docs_is_the_result() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "quantisation.md"
    assert table(json.loads(OUT.read_text("utf-8"))) in document.read_text("utf-8")


def test_rows_of_another_machine_say_so() -> None:
    result = json.loads(OUT.read_text("utf-8"))
    there = {**result["machine"], "cpu": "Another"}
    for rows in result["bases"].values():
        for row in rows.values():
            row.pop("machine", None)
    assert "Other rows" not in table(result)
    result["bases"]["smollm2"]["int8"]["machine"] = there
    last = table(result).splitlines()[-1]
    assert last.startswith("Other rows (smollm2 int8): Measured on ")
    assert "Another" in last
