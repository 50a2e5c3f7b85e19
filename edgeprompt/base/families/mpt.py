"""MPT: ALiBi, a bias on the scores that grows with the key's position, in its own attention code."""

from __future__ import annotations

from typing import Any

import torch

from edgeprompt.base.families.decoder import DecoderFamily, replacing


def _forward(
    self: Any, hidden_states: torch.Tensor, position_bias: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    from edgeprompt.base.fused_attention import current_step, group_query_attention

    packed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        packed = packed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = packed.chunk(3, dim=2)
    total = current_step().total_length
    # [heads, 1, max_seq_len] ends in 0 and falls by a slope a position; softmax ignores where a line begins.
    slopes = position_bias[:, :, -1:] - position_bias[:, :, -2:-1]
    bias = (slopes * torch.arange(total, dtype=torch.float32)).expand(1, self.n_heads, query.shape[1], total)
    out = group_query_attention(
        self.layer_idx,
        query,
        key,
        value,
        heads=self.n_heads,
        kv_heads=self.n_heads,
        scale=self.softmax_scale,
        bias=bias,
    )
    return self.out_proj(out), None


FAMILIES = (DecoderFamily("mpt", patch=replacing("MptAttention", "forward", _forward)),)
