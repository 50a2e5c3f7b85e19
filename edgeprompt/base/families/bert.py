"""BERT and what is built like it: learned absolute positions, attention through transformers' interface."""

from __future__ import annotations

from typing import Any

from edgeprompt.base.families.encoder import EncoderFamily


def _distilbert(model: Any, hidden: Any) -> Any:
    return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))))


FAMILIES = (
    EncoderFamily("bert", lm_logits=lambda model, hidden: model.cls(hidden)),
    EncoderFamily("roberta"),
    EncoderFamily("xlm-roberta"),
    EncoderFamily("camembert"),
    EncoderFamily("distilbert", lm_logits=_distilbert),
    EncoderFamily(
        "electra",
        lm_logits=lambda model, hidden: model.generator_lm_head(model.generator_predictions(hidden)),
    ),
    EncoderFamily("albert", lm_logits=lambda model, hidden: model.predictions(hidden)),
    EncoderFamily("modernbert", lm_logits=lambda model, hidden: model.decoder(model.head(hidden))),
)
