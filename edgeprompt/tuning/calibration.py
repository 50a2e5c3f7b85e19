"""Contextual calibration of a tuned verbalizer, kept only where the eval data gains by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgeprompt.progress import Update
from edgeprompt.prompts.verbalizer import CONTENT_FREE, contextual_calibration
from edgeprompt.tuning.examples import Examples
from edgeprompt.tuning.objectives import WordClassify


def choose_calibration(
    objective: WordClassify, examples: Examples, batches: Sequence[Sequence[int]], shared: Any, tell: Update
) -> tuple[float, ...]:
    """Values to subtract from the labels' scores, or none where they do not make the eval accuracy better.

    Args:
        objective: the task with the tuned prompt.
        examples: where the eval batches come from.
        batches: indices of the eval examples.
        shared: `objective.model.shared()`.
        tell: called with how many batches are done.
    """
    slots = objective.encoder.template.slots
    mask = objective.encoder.tokenizer.mask_token
    free = [text for text in CONTENT_FREE if text != mask]  # which a cloze template would take for its own
    texts = [objective.text_ids(dict.fromkeys(slots, text)) for text in free]
    calibration = contextual_calibration(objective.scores(texts, shared).cpu().numpy())
    prior = torch.tensor(calibration)
    plain = calibrated = 0
    for number, batch in enumerate(batches, 1):
        chosen = [examples[index] for index in batch]
        scores = objective.scores([example.ids for example in chosen], shared).cpu()
        target = torch.tensor([example.target[0] for example in chosen])
        plain += int((scores.argmax(-1) == target).sum())
        calibrated += int(((scores - prior).argmax(-1) == target).sum())
        tell(number, "")
    return calibration if calibrated > plain else ()
