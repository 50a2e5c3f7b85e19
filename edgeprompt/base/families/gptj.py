"""GPT-J: its own attention code, with positions rotated in pairs before it."""

from __future__ import annotations

from typing import Any

import torch

from edgeprompt.base.families.decoder import DecoderFamily, replacing


def attention_on_heads(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
) -> tuple[torch.Tensor, None]:
    """Takes the place of `_attn` in GPT-J and its descendants: [batch, heads, length, head_size] in and out."""
    from edgeprompt.base.fused_attention import fused_attention

    out, _ = fused_attention(self, query.float(), key.float(), value, None, scaling=float(1 / self.scale_attn))
    return out.transpose(1, 2), None


FAMILIES = (DecoderFamily("gptj", patch=replacing("GPTJAttention", "_attn", attention_on_heads)),)
