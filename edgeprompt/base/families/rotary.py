"""Decoders with rotary positions and attention behind transformers' AttentionInterface: nothing but data."""

from __future__ import annotations

from edgeprompt.base.families.decoder import DecoderFamily

FAMILIES = (
    DecoderFamily("llama", genai=True, fused_rotary=True),
    DecoderFamily("mistral", genai=True, fused_rotary=True),
    DecoderFamily("qwen2", genai=True, fused_rotary=True),
    DecoderFamily("qwen3", genai=True, fused_rotary=True),
    DecoderFamily("gemma3_text", fused_rotary=True),
    DecoderFamily("phi3", genai=True, fused_rotary=True),
    DecoderFamily("smollm3", fused_rotary=True),
    DecoderFamily("gpt_neox"),
)
