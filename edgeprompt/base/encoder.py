"""Loads an encoder with all that its checkpoint holds: the pooler if it was trained, the masked-language-model head."""

from __future__ import annotations

from typing import Any


def read_encoder(source: str, options: dict[str, str]) -> Any:
    """The base encoder, inside its masked language model where the checkpoint has that head.

    A pooler without weights in the checkpoint is left out: transformers would fill it with random numbers.

    Args:
        source: Folder or Hugging Face id.
        options: Further arguments of `from_pretrained`.
    """
    import torch
    import transformers

    loading = {"dtype": torch.float32, "output_loading_info": True, **options}
    base, info = transformers.AutoModel.from_pretrained(source, **loading)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        base.pooler = None
    if not any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in base.config.architectures or ()):
        return base
    if base.config.model_type == "electra" and base.config.architectures[0].endswith("ForPreTraining"):
        return base  # a discriminator: it tells replaced tokens, and predicts none
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(source, **loading)
    if any(not key.startswith(model.base_model_prefix) for key in info["missing_keys"]):
        return base
    setattr(model, model.base_model_prefix, base)
    model.tie_weights()
    return model
