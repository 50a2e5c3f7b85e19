"""T5 (v1.0 and the v1.1/FLAN geometry) and mT5: relative positions, unscaled scores."""

from __future__ import annotations

from typing import Any

from exporters.families.seq2seq import Attentions, Seq2SeqFamily


def _attentions(model: Any) -> Attentions:
    cross = [block.layer[1].EncDecAttention for block in model.decoder.block]
    return Attentions(
        encoder=[block.layer[0].SelfAttention for block in model.encoder.block],
        decoder=[block.layer[0].SelfAttention for block in model.decoder.block],
        cross=cross,
        cross_projections=[(attention.k, attention.v) for attention in cross],
    )


FAMILIES = tuple(
    Seq2SeqFamily(model_type, attentions=_attentions, relative_positions=True) for model_type in ("t5", "mt5")
)
