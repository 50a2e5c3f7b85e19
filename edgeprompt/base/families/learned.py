"""Decoders with learned positions and attention behind transformers' AttentionInterface: nothing but data."""

from __future__ import annotations

from edgeprompt.base.families.decoder import DecoderFamily

FAMILIES = (
    DecoderFamily("gpt2"),
    DecoderFamily("opt"),
)
