"""DeBERTa-v2 and v3: disentangled attention, whose relative scores enter as a bias.

A prefix has no distance to the text: its keys are scored by content alone, with the factor that the text has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgeprompt.base.families.encoder import EncoderFamily


def _forward(
    self: Any,
    hidden_states: Any,
    attention_mask: Any,
    output_attentions: bool = False,
    query_states: Any = None,
    relative_pos: Any = None,
    rel_embeddings: Any = None,
) -> tuple[Any, None]:
    from edgeprompt.base.encoder_attention import attend

    batch, length, _ = hidden_states.shape
    heads = self.num_attention_heads
    query, key, value = (
        self.transpose_for_scores(part(hidden_states), heads)
        for part in (self.query_proj, self.key_proj, self.value_proj)
    )
    terms = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
    bias = None
    if self.relative_attention:
        bias = self.disentangled_attention_bias(query, key, relative_pos, rel_embeddings, terms)
        bias = bias.view(batch, heads, length, length)
    query, key, value = (x.view(batch, heads, length, -1) for x in (query, key, value))
    scaling = 1.0 / math.sqrt(self.attention_head_size * terms)
    out, _ = attend(self, query, key, value, None, scaling, bias=bias)
    return out.reshape(batch, length, -1), None


@contextmanager
def _patched(model: Any) -> Iterator[None]:
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    before = DisentangledSelfAttention.forward
    DisentangledSelfAttention.forward = _forward
    try:
        yield
    finally:
        DisentangledSelfAttention.forward = before


def _logits(model: Any, hidden: Any) -> Any:
    return model.cls(hidden)


FAMILIES = (EncoderFamily("deberta-v2", patch=_patched, lm_logits=_logits),)
