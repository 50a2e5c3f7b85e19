"""What the encoder exporter must know about a family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from edgeprompt import names
from edgeprompt.base.families import Family


def _no_patch(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class EncoderFamily(Family):
    """An encoder-only family."""

    architecture: str = names.ENCODER_ONLY
    position_ids: bool = True
    """Whether positions enter the model (learned or rotary); False: relative distances alone."""
    lm_logits: Callable[[Any, Any], Any] = lambda model, hidden: model.lm_head(hidden)
    """(masked language model, hidden states `[n, hidden_size]`) -> logits `[n, vocab_size]`."""
    patch: Callable[[Any], AbstractContextManager[None]] = _no_patch
    """For attention code that does not go through transformers' AttentionInterface: puts ours in, and restores."""
