"""What a run writes into its prompt file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from edgeprompt.prompts.file import Golden
from edgeprompt.tuning.runs import _golden

MARGINS = {"near": 0.2, "nearer": 0.1, "clear": 2.0, "clearest": 9.0}


class Answers:
    """An objective whose answers have the margins above."""

    def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
        return Golden(dict(fields), label="yes", logits={"yes": MARGINS[fields["text"]], "no": 0.0})


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [(("near", "clear", "clearest"), "clear"), (("nearer", "near"), "near"), (("near",), "near")],
)
def test_the_golden_example_is_no_near_tie(texts: Sequence[str], chosen: str) -> None:
    """Rounding of another processor's kernels must not change its answer."""
    candidates = [{"text": text} for text in texts]
    objective: Any = Answers()
    assert _golden(objective, candidates, None, ()).fields == {"text": chosen}


def test_calibration_counts() -> None:
    objective: Any = Answers()
    golden = _golden(objective, [{"text": "clear"}, {"text": "clearest"}], None, (1.5, 0.0))
    assert golden.fields == {"text": "clearest"}


def test_values_without_labels_are_taken_as_they_are() -> None:
    class Numbers(Answers):
        def golden(self, fields: Mapping[str, str], shared: Any, calibration: Sequence[float]) -> Golden:
            return Golden(dict(fields), logits={"grade": 0.3, "length": 0.3})

    objective: Any = Numbers()
    assert _golden(objective, [{"text": "first"}, {"text": "second"}], None, ()).fields == {"text": "first"}
