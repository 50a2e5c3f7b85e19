"""Loads an encoder with all that its checkpoint holds: the pooler if it was trained, the masked-language-model head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprompt.base import accounting
from edgeprompt.errors import SourceError


def read_encoder(config: Any, tensors: Mapping[str, Any], given: str) -> Any:
    """The base encoder, inside its masked language model where the checkpoint has that head.

    A pooler without weights in the checkpoint is left out: transformers would fill it with random numbers.

    Args:
        config: Its transformers config.
        tensors: What the checkpoint holds (`edgeprompt.base.checkpoint.read_checkpoint`).
        given: The base as the user named it.

    Raises:
        SourceError: the config makes a decoder of it; tensors are missing, or there are some that no part of the
            model takes.
    """
    import transformers

    if getattr(config, "is_decoder", False):
        raise SourceError(
            f"the config of {given!r} says is_decoder, so each token reads those before it alone; an encoder reads "
            "all: give the encoder, or take is_decoder out of config.json"
        )
    base_class = transformers.MODEL_MAPPING[type(config)]
    renamed = accounting.match(tensors, config, base_class, given)
    base, info = accounting.load(base_class, config, renamed, given)
    unused = set(info["unexpected_keys"])
    pooler = {name for name in base.state_dict() if name.startswith("pooler.")}
    if pooler and pooler <= info["missing_keys"]:
        base.pooler = None
        info["missing_keys"] = set(info["missing_keys"]) - pooler
    model = _with_head(base, renamed, given, unused) if _has_head(config) else base
    accounting.check_loaded(info, base, given, unused=unused)
    accounting.check_kept(model, renamed, given)
    return model


def _has_head(config: Any) -> bool:
    architectures = config.architectures or ()
    if config.model_type == "electra" and any(name.endswith("ForPreTraining") for name in architectures):
        return False  # a discriminator: it tells replaced tokens, and predicts none
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in architectures)


def _with_head(base: Any, tensors: Mapping[str, Any], given: str, unused: set[str]) -> Any:
    """`base` in its masked language model; takes what that reads out of `unused`."""
    import transformers

    model_class = transformers.MODEL_FOR_MASKED_LM_MAPPING[type(base.config)]
    model, info = accounting.load(model_class, base.config, tensors, given)
    inner = f"{model.base_model_prefix}."
    head = {name for name in model.state_dict() if not name.startswith(inner)}
    missing = {name for name in info["missing_keys"] if name in head}
    if missing and missing >= head - set(model.all_tied_weights_keys):
        accounting.tell(
            f"{given!r} says that it is a masked language model, but has no head for it; it cannot fill a mask"
        )
        return base
    unused &= set(info["unexpected_keys"])
    accounting.check_loaded({**info, "missing_keys": missing}, model, given, unused=())
    setattr(model, model.base_model_prefix, base)
    model.tie_weights()
    return model
