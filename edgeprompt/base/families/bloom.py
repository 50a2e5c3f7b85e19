"""BLOOM: ALiBi, a bias on the scores that grows with the key's position, in its own attention code."""

from __future__ import annotations

from typing import Any

import torch

from edgeprompt.base.families.decoder import DecoderFamily, replacing


def _forward(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    from edgeprompt.base.fused_attention import current_step, group_query_attention

    batch, length, _ = hidden_states.shape
    query, key, value = (
        part.transpose(1, 2).reshape(batch, length, -1) for part in self._reshape(self.query_key_value(hidden_states))
    )
    # Softmax ignores what is the same for all keys of a query, so the key's own position does for its distance.
    positions = torch.arange(current_step().total_length, dtype=torch.float32)
    slopes = _get_alibi_slopes(self.num_heads, hidden_states.device)[None, :, None, None]
    bias = (slopes * positions).expand(1, self.num_heads, length, current_step().total_length)
    out = group_query_attention(
        self.layer_idx,
        query,
        key,
        value,
        heads=self.num_heads,
        kv_heads=self.num_heads,
        scale=self.inv_norm_factor,
        bias=bias,
    )
    return self.dense(out) + residual, None


FAMILIES = (DecoderFamily("bloom", patch=replacing("BloomAttention", "forward", _forward)),)
