"""Stands in for a model's own attention, rotary positions and norms, so that they export as fused operators.

Transformers lets a custom function take the place of every model's attention (`AttentionInterface`); under
`torch.onnx.export` ours emits `com.microsoft::GroupQueryAttention`, which appends to the KV cache, applies rotary
positions, sliding windows, soft caps and sinks. Root-mean-square norms become `SimplifiedLayerNormalization`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from edgeprompt.base.rope import position_limit

NAME = "edgeprompt_fused"
_MS_DOMAIN_VERSION = 1


@dataclass
class Step:
    """What attention needs of the graph's inputs and the model's own forward does not carry."""

    past: list[tuple[torch.Tensor, torch.Tensor]]
    seqlens_k: torch.Tensor
    """int32 [batch, 1]: tokens in each row's cache, this piece included, less one."""
    total: torch.Tensor
    """int32 scalar: the mask's length."""
    total_length: Any
    mask: torch.Tensor
    """The attention mask, int64 [batch, total]."""
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """Tables that the next attention shall rotate with: set in the place where the model would have rotated."""


_step: ContextVar[Step] = ContextVar("edgeprompt_step")


@contextlib.contextmanager
def running(step: Step) -> Iterator[Step]:
    """Make `step` the one that attention reads and writes."""
    token = _step.set(step)
    try:
        yield step
    finally:
        _step.reset(token)


def current_step() -> Step:
    """The step of the forward pass that is being traced."""
    return _step.get()


def fused_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it, as one GroupQueryAttention.

    Args:
        module: The attention module; its `layer_idx` says which cache to use.
        query: [batch, heads, length, head_size]; key and value with their own number of heads.
        key: See query.
        value: See query.
        attention_mask: Unused: lengths come from the step.
        scaling: Factor of the scores, 1/sqrt(head_size) if None.
        **kwargs: `sliding_window`, `softcap` where the family has them.

    Returns:
        [batch, length, heads, head_size], and None for the weights.
    """
    batch, heads, length, head_size = query.shape
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    out = group_query_attention(
        module.layer_idx,
        query.transpose(1, 2).reshape(batch, length, -1),
        key.transpose(1, 2).reshape(batch, length, -1),
        value.transpose(1, 2).reshape(batch, length, -1),
        heads=heads,
        kv_heads=key.shape[1],
        scale=scaling,
        window=int(window) if window else None,
        softcap=kwargs.get("softcap"),
    )
    return out.reshape(batch, length, heads, head_size), None


def group_query_attention(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Emit the operator for one layer; operands are [batch, length, heads * head_size].

    `bias` is added to the scores, [batch or 1, heads or 1, length, total].
    """
    step = current_step()
    batch, length, width = query.shape
    head_size = width // heads
    past_key, past_value = step.past[layer]
    rotary, step.rotary = step.rotary, None
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(scale if scale is not None else head_size**-0.5),
        "do_rotary": int(rotary is not None),
    }
    if window:
        attributes["local_window_size"] = window
    if softcap:
        attributes["softcap"] = float(softcap)
    operands: list[torch.Tensor | None] = [query, key, value, past_key, past_value, step.seqlens_k, step.total]
    operands += list(rotary) if rotary is not None else [None, None]
    operands += [None, bias]
    while operands[-1] is None:
        operands.pop()
    kv_shape = (batch, kv_heads, step.total_length, head_size)
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        tuple(operands),
        attrs=attributes,
        dtypes=(query.dtype,) * 3,
        shapes=((batch, length, width), kv_shape, kv_shape),
        version=_MS_DOMAIN_VERSION,
    )
    step.present[layer] = (present_key, present_value)
    return out


@contextlib.contextmanager
def fused(model: Any, *, rotary: bool) -> Iterator[None]:
    """Put fused attention, norms and (if `rotary`) in-operator rotation into a model; all is restored at the end."""
    AttentionInterface.register(NAME, fused_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    with contextlib.ExitStack() as stack:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(NAME)
            stack.callback(model.set_attn_implementation, before)
        for module in model.modules():
            if _is_rms_norm(module):
                stack.enter_context(_replaced(module, "forward", _rms_norm_forward(module)))
            if rotary and hasattr(module, "rotary_emb"):
                positions = position_limit(model.config, int(model.config.max_position_embeddings))
                stack.enter_context(_rotary_tables(module.rotary_emb, positions))
        if rotary:
            file = sys.modules[type(model).__module__]
            stack.enter_context(_replaced(file, "apply_rotary_pos_emb", _postpone_rotary))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _postpone_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    current_step().rotary = (cos, sin)
    return query, key


@contextlib.contextmanager
def _rotary_tables(module: Any, length: int) -> Iterator[None]:
    """Make a rotary module return its whole tables [length, head_size / 2] instead of rows for given positions.

    The module itself computes them, so every type of scaling is right up to `edgeprompt.base.rope.position_limit`.
    """
    original = module.forward
    tables: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def compute(*extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(length)[None]
        with torch.no_grad():
            cos, sin = original(torch.zeros(1, dtype=torch.float32), positions, *extra)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    for layer_type in getattr(module, "layer_types", None) or [None]:
        extra = () if layer_type is None else (layer_type,)
        tables[extra] = compute(*extra)
        label = str(layer_type or "all")
        module.register_buffer(f"edgeprompt_cos_{label}", tables[extra][0], persistent=False)
        module.register_buffer(f"edgeprompt_sin_{label}", tables[extra][1], persistent=False)

    def forward(x: Any, position_ids: Any = None, layer_type: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        label = str(layer_type or "all")
        return getattr(module, f"edgeprompt_cos_{label}"), getattr(module, f"edgeprompt_sin_{label}")

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        for extra in tables:
            label = str(extra[0] if extra else "all")
            delattr(module, f"edgeprompt_cos_{label}")
            delattr(module, f"edgeprompt_sin_{label}")


def _is_rms_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def _rms_norm_forward(module: Any) -> Any:
    epsilon = next(
        (float(getattr(module, name)) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), 1e-6
    )
    # Gemma stores the weight less one; which it is shows in the module's own answer to ones.
    with torch.no_grad():
        probe = torch.ones(1, module.weight.shape[0])
        offset = bool((module.forward(probe)[0] - module.weight - 1).abs().max() < 1e-3)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight = module.weight + 1 if offset else module.weight
        (out,) = torch.onnx.ops.symbolic_multi_out(
            "SimplifiedLayerNormalization",
            (hidden, weight),
            attrs={"axis": -1, "epsilon": epsilon, "stash_type": 1},
            dtypes=(hidden.dtype,),
            shapes=(hidden.shape,),
            version=1,
        )
        return out

    return forward
