"""Deep prompts in any encoder: an attention function that puts a prefix of keys and values in front of every layer's.

Transformers lets a function stand in for every model's attention (`AttentionInterface`). Ours takes the prefix of the
layer that calls it, so an encoder needs no cache arguments of its own, and PEFT's and our own deep prompts run the
same way on all of them. Families with attention code of their own are patched to call the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "edgeprompt_encoder"


@dataclass
class Call:
    """One forward pass: its prefixes and mask, and which layer comes next."""

    past: Sequence[tuple[Tensor, Tensor]]
    """Per layer, keys and values `[batch_size, num_heads, prefix_length, head_size]`."""
    mask: Tensor
    """int64 `[batch_size, prefix_length + sequence_length]`, 1 where something stands."""
    fused: bool = False
    """Whether the graph takes com.microsoft::MultiHeadAttention (export), else plain PyTorch (training, reference)."""
    layer: int = 0
    windows: dict[int, Tensor] | None = None

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """The prefix of the layer that calls. Layers may share their module (ALBERT), so calls are counted."""
        self.layer += 1
        return self.past[self.layer - 1]


_call: Call | None = None


class Patchable(Protocol):
    """What a family tells about its attention."""

    def patch(self, model: Any) -> Any:
        """A context in which the model's attention calls `attend`."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    bias: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over the layer's prefix and the text.

    Args:
        module: The calling module; unused, the interface has it.
        query: `[batch_size, num_heads, sequence_length, head_size]`, as `key` and `value`.
        key: Keys of the text.
        value: Values of the text.
        attention_mask: Unused; the mask of the running `Call` covers the prefix as well.
        scaling: Factor on the scores; None for one over the root of the head size.
        bias: Added to the scores of the text, `[1 or batch_size, num_heads, sequence_length, sequence_length]`;
            a prefix has no position, so its scores get none.
        sliding_window: Text positions further apart than this, less one, do not see each other.

    Returns:
        `[batch_size, sequence_length, num_heads, head_size]`, and no weights.
    """
    assert _call is not None, "attend is for use inside deep_prompts"
    prefix_key, prefix_value = _call.next_layer()
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    if sliding_window is not None:
        bias = _window_bias(query, sliding_window)
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (prefix_key.shape[2], 0))
    if _call.fused:
        return _fused(query, key, value, prefix_key, prefix_value, bias, scale), None
    mask = (1.0 - _call.mask[:, None, None, :].to(query.dtype)) * torch.finfo(query.dtype).min
    bias = mask if bias is None else bias + mask
    key, value = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    return out.transpose(1, 2), None


def _window_bias(query: Tensor, window: int) -> Tensor:
    """0 where text positions see each other, else the least float: `[1, 1, sequence_length, sequence_length]`."""
    assert _call is not None
    _call.windows = _call.windows or {}
    if window not in _call.windows:
        index = torch.arange(query.shape[2])
        far = (index[:, None] - index[None, :]).abs() >= window
        _call.windows[window] = far[None, None].to(query.dtype) * torch.finfo(query.dtype).min
    return _call.windows[window]


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    assert _call is not None
    batch, heads, length, size = query.shape
    total = (batch, heads, prefix_key.shape[2] + length, size)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch, length, heads * size)

    out, _, _ = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::MultiHeadAttention",
        (flat(query), flat(key), flat(value), None, _call.mask.to(torch.int32), bias, prefix_key, prefix_value),
        attrs={"num_heads": heads, "scale": scale},
        dtypes=(query.dtype,) * 3,
        shapes=((batch, length, heads * size), total, total),
        version=1,
    )
    return out.reshape(batch, length, heads, size)


@contextmanager
def deep_prompts(model: Any, call: Call) -> Iterator[None]:
    """Run `model`'s attention through `attend` with the prefixes of `call`.

    Args:
        model: A base encoder in transformers, or a model around one, that goes through the AttentionInterface.
        call: Prefixes and mask of the one forward pass that follows.
    """
    global _call
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _call = call
    try:
        yield
    finally:
        _call = None
        model.set_attn_implementation(before)
