"""T5 (v1.0 and the v1.1/FLAN geometry) and mT5: relative positions, unscaled scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprompt.base.families.seq2seq import Attentions, Seq2SeqFamily


def _attentions(model: Any) -> Attentions:
    cross = [block.layer[1].EncDecAttention for block in model.decoder.block]
    return Attentions(
        encoder=[block.layer[0].SelfAttention for block in model.encoder.block],
        decoder=[block.layer[0].SelfAttention for block in model.decoder.block],
        cross=cross,
        cross_projections=[(attention.k, attention.v) for attention in cross],
    )


def _prepare(model: Any) -> None:
    # transformers 5 writes tie_word_embeddings true for every T5 it saves, and reads it back as "scale the output".
    # Only tied weights are scaled (T5 v1.0); v1.1, FLAN and mT5 have an lm_head of their own.
    tied = bool((model.lm_head.weight == model.shared.weight).all())
    model.config.scale_decoder_outputs = tied


def _untied(config: Mapping[str, Any]) -> bool:
    # Versions 1.1 and later (gated layers) untie the head; transformers 5 notes that as "scale the output" alone.
    gated = str(config.get("feed_forward_proj", "")).startswith("gated")
    return gated or config.get("tie_word_embeddings") is False or config.get("scale_decoder_outputs") is False


FAMILIES = tuple(
    Seq2SeqFamily(model_type, attentions=_attentions, relative_positions=True, prepare=_prepare, untied=_untied)
    for model_type in ("t5", "mt5")
)
