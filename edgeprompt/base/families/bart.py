"""BART and its descendants mBART, Pegasus and Marian: absolute positions, learned or sinusoidal."""

from __future__ import annotations

from typing import Any

from edgeprompt.base.families.seq2seq import Attentions, Seq2SeqFamily


def _attentions(model: Any) -> Attentions:
    encoder, decoder = model.get_encoder(), model.get_decoder()
    cross = [layer.encoder_attn for layer in decoder.layers]
    return Attentions(
        encoder=[layer.self_attn for layer in encoder.layers],
        decoder=[layer.self_attn for layer in decoder.layers],
        cross=cross,
        cross_projections=[(attention.k_proj, attention.v_proj) for attention in cross],
    )


FAMILIES = tuple(
    Seq2SeqFamily(model_type, attentions=_attentions) for model_type in ("bart", "mbart", "pegasus", "marian")
)
