"""Rotary positions whose scaling a graph with cached keys can follow, and up to which length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprompt.errors import SourceError

BY_LENGTH = ("dynamic", "longrope")
"""Types that turn all positions otherwise once a text is longer than a limit, those of cached keys too."""


def check_rope(config: Any, base: str) -> None:
    """Refuse scaling that the installed transformers does not compute, or would leave out.

    Args:
        config: A transformers config.
        base: What to call the base.

    Raises:
        SourceError: names the type, and those that are known.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None) or {}
    layers = getattr(config, "_rope_type_labels", None) or getattr(config, "layer_types", None) or ()
    for name, value in rope.items():
        if isinstance(value, Mapping) and name not in layers:
            raise SourceError(
                f"the config of {base!r} scales rotary positions of layers {name!r}, and has layers of type "
                f"{', '.join(sorted(set(layers))) or 'none'}; mend rope_parameters in config.json"
            )
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for part in _parts(config):
        if part.get("rope_type", "default") not in known:
            raise SourceError(
                f"the config of {base!r} scales rotary positions by rope_type {part['rope_type']!r}; known: "
                f"{', '.join(known)}; choose another base, or a transformers that knows it"
            )


def scales_by_length(config: Any) -> bool:
    """Whether frequencies depend on the text's length, beyond `position_limit`."""
    return any(part.get("rope_type") in BY_LENGTH for part in _parts(config))


def rotary_size(config: Any, head_size: int) -> int:
    """How many of a head's values are rotated (`proportional` scaling turns all, some of them by nothing)."""
    shares = [
        part.get("partial_rotary_factor") or 1.0
        for part in _parts(config)
        if part.get("rope_type", "default") != "proportional"
    ]
    return int(head_size * min([1.0, *shares]))


def position_limit(config: Any, positions: int) -> int:
    """The positions of `positions` up to which the frequencies stay what they are for short texts.

    Of `dynamic` scaling these are the config's own, of `longrope` those with the short factors.
    """
    limits = [
        int(part["original_max_position_embeddings"])
        for part in _parts(config)
        if part.get("rope_type") == "longrope" and part.get("original_max_position_embeddings")
    ]
    return min([positions, *limits])


def _parts(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of every type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
