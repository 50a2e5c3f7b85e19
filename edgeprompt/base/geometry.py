"""Sizes of a base model, whatever its family calls them."""

from __future__ import annotations

import logging
from typing import Any

from optimum.utils import NormalizedConfigManager

from edgeprompt.base.rope import position_limit
from edgeprompt.errors import SourceError
from edgeprompt.package.manifest import Geometry, Tokens

_LOG = logging.getLogger("edgeprompt")
_NAMES = {
    "hidden_size": ("hidden_size", "d_model", "n_embd", "dim"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
}
_DECODER_NAMES = {
    "num_layers": ("num_decoder_layers", "decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads",),
}
_POSITION_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
_SEVERAL = ("eos_token_id", "forced_eos_token_id")
_OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert", "mpnet")


def geometry_of(config: Any) -> Geometry:
    """Read a transformers config through optimum's NormalizedConfig, and by the usual names where it has none.

    For encoder-decoder models the layers and heads are the decoder's.

    Raises:
        SourceError: a size is in none of the known places.
    """
    config = text_config(config)
    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    head_size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    offset = (config.pad_token_id or 0) + 1 if config.model_type in _OFFSET_FAMILIES else 0
    limit = next((value for name in _POSITION_NAMES if (value := getattr(config, name, None))), 0)
    # T5's n_positions is a leftover of its training length: relative positions have no end.
    if config.model_type in ("t5", "mt5", "umt5", "bloom"):
        limit = 0
    return Geometry(
        vocab_size=int(config.vocab_size),
        hidden_size=int(hidden),
        num_layers=_size(config, "num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(kv_heads or heads),
        head_size=int(head_size),
        max_positions=position_limit(config, max(0, int(limit) - offset)),
        num_encoder_layers=_encoder_layers(config) if encoder_decoder else 0,
        position_offset=offset,
        embedding_size=_embedding_size(config, hidden),
    )


def tokens_of(config: Any, generation_config: Any = None, tokenizer: Any = None) -> Tokens:
    """Special token ids: the generation config's first, then the model's, then the tokenizer's.

    A padding token of -1 is none. So is what the config's class says by default, where the base has no such token.

    Raises:
        SourceError: one is no token of the base.
    """
    size = int(text_config(config).vocab_size)
    sources = (("generation config", generation_config), ("config", config), ("tokenizer", tokenizer))

    def find(name: str) -> Any:
        for where, source in sources:
            value = getattr(source, name, None)
            if value is None or (name == "pad_token_id" and value == -1):
                continue
            several = name in _SEVERAL and isinstance(value, (list, tuple))
            wrong = [one for one in (value if several else [value]) if not _is_token(one, size)]
            if not wrong:
                return value
            if source is tokenizer or value != _usual(config, name):
                raise SourceError(
                    f"the base's {where} says {name} {value!r}, and {wrong[0]!r} is none of its {size} tokens; correct "
                    "it there"
                )
            _LOG.warning("note: %s=%r is no token of this base, so it is taken to have none", name, value)
        return None

    eos, forced_eos = find("eos_token_id"), find("forced_eos_token_id")
    return Tokens(
        bos=find("bos_token_id"),
        eos=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),),
        pad=find("pad_token_id"),
        mask=getattr(tokenizer, "mask_token_id", None),
        decoder_start=find("decoder_start_token_id"),
        forced_bos=find("forced_bos_token_id"),
        forced_eos=None if isinstance(forced_eos, (list, tuple)) else forced_eos,  # `generation` holds several
    )


def _is_token(value: Any, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


def _usual(config: Any, name: str) -> Any:
    """The default of a config's class."""
    try:
        return getattr(type(config)(), name, None)
    except Exception:  # a class that needs arguments has no defaults
        return None


def text_config(config: Any) -> Any:
    """The language model's part of a config (models with several modalities nest it)."""
    return config.get_text_config() if getattr(config, "text_config", None) is not None else config


def _embedding_size(config: Any, hidden: int) -> int:
    size = getattr(config, "embedding_size", None) or getattr(config, "word_embed_proj_dim", None) or hidden
    return 0 if size == hidden else int(size)


def _encoder_layers(config: Any) -> int:
    return int(getattr(config, "encoder_layers", None) or config.num_layers)


def _size(config: Any, name: str) -> int:
    # Encoder-decoder configs name the encoder's size first; NormalizedConfig then answers for the encoder.
    decoder = _DECODER_NAMES.get(name, ()) if getattr(config, "is_encoder_decoder", False) else ()
    for known in decoder:
        if getattr(config, known, None):
            return int(getattr(config, known))
    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        return int(getattr(normalized, name))
    except (KeyError, AttributeError):
        pass
    for known in _NAMES[name]:
        if getattr(config, known, None):
            return int(getattr(config, known))
    raise SourceError(
        f"config of model_type {config.model_type!r} has no {name}; looked for {', '.join((*decoder, *_NAMES[name]))}"
    )
