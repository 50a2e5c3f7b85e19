"""What the encoder-decoder exporter must know about a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprompt import names
from edgeprompt.base.families import Family


@dataclass(frozen=True)
class Attentions:
    """A model's attention modules by layer, and the projections of encoder states to cross keys and values."""

    encoder: Sequence[Any]
    decoder: Sequence[Any]
    cross: Sequence[Any]
    cross_projections: Sequence[tuple[Any, Any]]


def _nothing(model: Any) -> None:
    """Most models are what their config says."""


def _as_config(config: Mapping[str, Any]) -> bool:
    return config.get("tie_word_embeddings") is False


@dataclass(frozen=True)
class Seq2SeqFamily(Family):
    """An encoder-decoder family, for models whose attention goes through transformers' AttentionInterface."""

    architecture: str = names.ENCODER_DECODER
    attentions: Callable[[Any], Attentions] = lambda model: Attentions((), (), (), ())
    relative_positions: bool = False
    """Whether self-attention adds a bias by distance, held by the first layer (T5), instead of absolute positions."""
    prepare: Callable[[Any], None] = _nothing
    """Puts a loaded model's config right where it contradicts the weights."""
    untied: Callable[[Mapping[str, Any]], bool] = _as_config
    """Whether the head has weights of its own, by what config.json says."""
