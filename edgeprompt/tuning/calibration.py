"""Contextual calibration (Zhao et al. 2021, arXiv:2102.09690): take away what the prompt answers to no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgeprompt.tuning.examples import Examples
from edgeprompt.tuning.objectives import CausalClassify

CONTENT_FREE = ("N/A", "...", "-")
"""Texts that say nothing. Each fills every slot of the template."""


def choose_calibration(
    objective: CausalClassify, examples: Examples, batches: Sequence[Sequence[int]], shared: Any
) -> tuple[float, ...]:
    """Biases to subtract from the labels' scores, or none if they do not make the eval data's accuracy better.

    Args:
        objective: the task with the tuned prompt.
        examples: where the eval batches come from.
        batches: indices of the eval examples.
        shared: `objective.shared()`.
    """
    slots = objective.template.slots
    rows = [objective.text_ids(dict.fromkeys(slots, text)) for text in CONTENT_FREE]
    prior = objective.scores(rows, shared).log_softmax(-1).mean(0)
    plain = calibrated = 0
    for batch in batches:
        chosen = [examples[index] for index in batch]
        scores = objective.scores([example.ids for example in chosen], shared)
        target = torch.tensor([example.target[0] for example in chosen], device=scores.device)
        plain += int((scores.argmax(-1) == target).sum())
        calibrated += int(((scores - prior).argmax(-1) == target).sum())
    return tuple(float(value) for value in prior) if calibrated > plain else ()
