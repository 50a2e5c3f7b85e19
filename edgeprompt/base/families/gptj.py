"""GPT-J: its own attention code, with positions rotated in pairs before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from edgeprompt.base.families.decoder import DecoderFamily


def attention_on_heads(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
) -> tuple[torch.Tensor, None]:
    """Takes the place of `_attn` in GPT-J and its descendants: [batch, heads, length, head_size] in and out."""
    from edgeprompt.base.fused_attention import fused_attention

    out, _ = fused_attention(self, query.float(), key.float(), value, None, scaling=float(1 / self.scale_attn))
    return out.transpose(1, 2), None


@contextlib.contextmanager
def patch(model: Any) -> Iterator[None]:
    """Put fused attention into every attention module."""
    modules = [module for module in model.modules() if hasattr(type(module), "_attn")]
    for module in modules:
        module._attn = attention_on_heads.__get__(module)
    try:
        yield
    finally:
        for module in modules:
            del module._attn


FAMILIES = (DecoderFamily("gptj", patch=patch),)
