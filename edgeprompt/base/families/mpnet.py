"""MPNet: learned positions and a bias for relative distances, in attention code of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgeprompt.base.families.encoder import EncoderFamily


def _forward(
    self: Any, hidden_states: Any, attention_mask: Any = None, position_bias: Any = None, **_: Any
) -> tuple[Any]:
    from edgeprompt.base.encoder_attention import attend

    shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
    query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
    out = attend(self, query, key, value, None, bias=position_bias)[0]
    return (self.o(out.reshape(hidden_states.shape)),)


@contextmanager
def _patched(model: Any) -> Iterator[None]:
    from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

    before = MPNetSelfAttention.forward
    MPNetSelfAttention.forward = _forward
    try:
        yield
    finally:
        MPNetSelfAttention.forward = before


FAMILIES = (EncoderFamily("mpnet", patch=_patched),)
