"""The two graphs of an encoder-decoder: PyTorch wrappers around any transformers model, and their export to ONNX.

One attention function stands in for every model's own and puts `com.microsoft::MultiHeadAttention` into the graph.
Caches are padded on the left, so that rows of one batch may have pasts of different length: distances between
positions, and with them T5's bias, then do not depend on the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from edgeprompt import names
from edgeprompt.base.families.seq2seq import Seq2SeqFamily
from edgeprompt.base.geometry import geometry_of
from edgeprompt.errors import ExportError
from exporters.quiet import quiet_export

ATTENTION = "edgeprompt_seq2seq"
OPSET = 21
PARTS = ("key", "value")
# Added to the scores of masked positions; far below any score, and far from overflow when a bias is added.
MASKED = -1e9


class _Trace:
    """What the attention function needs and a model's forward does not carry."""

    encoder: dict[int, int]
    decoder: dict[int, int]
    cross: dict[int, int]
    mask: Tensor
    cross_mask: Tensor
    bias: Tensor | None
    past: list[tuple[Tensor, Tensor]]
    cross_past: list[tuple[Tensor, Tensor]]
    present: dict[int, tuple[Tensor, Tensor]]


class _Graph(torch.nn.Module):
    def __init__(self, model: Any, family: Seq2SeqFamily) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.trace = _Trace()
        found = family.attentions(model)
        for kind in ("encoder", "decoder", "cross"):
            setattr(self.trace, kind, {id(module): layer for layer, module in enumerate(getattr(found, kind))})
        self.found = found

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention as one operator; its signature is that of transformers' AttentionInterface."""
        batch, heads, length, head_size = query.shape
        trace, at = self.trace, id(module)
        attributes: dict[str, Any] = {"num_heads": heads, "scale": float(scaling or head_size**-0.5)}
        attributes["mask_filter_value"] = MASKED
        if at in trace.cross:
            key, value = trace.cross_past[trace.cross[at]]
            inputs = (_flat(query), key, value, None, trace.cross_mask)
        else:
            causal = at in trace.decoder
            layer = trace.decoder[at] if causal else trace.encoder[at]
            attributes["unidirectional"] = int(causal)
            past = trace.past[layer] if trace.past else ()
            inputs = (_flat(query), _flat(key), _flat(value), None, trace.mask, trace.bias, *past)
            if past:
                shape = (batch, heads, trace.mask.shape[1], head_size)
                out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
                    "com.microsoft::MultiHeadAttention",
                    inputs,
                    attrs=attributes,
                    dtypes=(query.dtype,) * 3,
                    shapes=((batch, length, heads * head_size), shape, shape),
                    version=1,
                )
                trace.present[layer] = (present_key, present_value)
                return out.reshape(batch, length, heads, head_size), None
        out = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            inputs,
            attrs=attributes,
            dtype=query.dtype,
            shape=(batch, length, heads * head_size),
            version=1,
        )
        return out.reshape(batch, length, heads, head_size), None

    def relative_bias(self, attention: Any, length: int, total: int) -> Tensor | None:
        """T5's bias [1, num_heads, length, total] by distance; None for families with absolute positions."""
        if not self.family.relative_positions:
            return None
        query = torch.arange(length)[:, None] + (total - length)
        bucket = attention._relative_position_bucket(
            torch.arange(total)[None] - query,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias: Tensor = attention.relative_attention_bias(bucket).permute(2, 0, 1)[None]
        return bias


class EncoderGraph(_Graph):
    """Text in, encoder states and the decoder's cross-attention keys and values out."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Trace the encoder; `past` is empty for families without encoder deep prompts."""
        trace = self.trace
        length, total = input_ids.shape[1], attention_mask.shape[1]
        trace.mask, trace.past, trace.present = attention_mask.to(torch.int32), past, {}
        trace.bias = self.relative_bias(self.found.encoder[0], length, total)
        encoder = self.model.get_encoder()
        with _positions(encoder, attention_mask, length):
            states = encoder(input_ids=input_ids).last_hidden_state
        crossed = []
        for attention, projections in zip(self.found.cross, self.found.cross_projections, strict=True):
            heads = getattr(attention, "n_heads", None) or attention.num_heads
            crossed += [project(states).unflatten(2, (heads, -1)).transpose(1, 2) for project in projections]
        return (states, *crossed)


class DecoderGraph(_Graph):
    """The next token's logits, from the cross keys and values and the decoder's own cache."""

    def __init__(self, model: Any, family: Seq2SeqFamily) -> None:
        super().__init__(model, family)
        bias = getattr(model, "final_logits_bias", None)
        self.logits_bias: Tensor | None = bias if bias is not None and bool(bias.any()) else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_attention_mask: Tensor,
        past: list[tuple[Tensor, Tensor]],
        cross_past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Trace the decoder, logits at the last position only."""
        trace, model = self.trace, self.model
        length, total = input_ids.shape[1], attention_mask.shape[1]
        trace.mask, trace.past, trace.present = attention_mask.to(torch.int32), past, {}
        trace.cross_mask, trace.cross_past = encoder_attention_mask.to(torch.int32), cross_past
        trace.bias = self.relative_bias(self.found.decoder[0], length, total)
        decoder = model.get_decoder()
        with _positions(decoder, attention_mask, length):
            hidden = decoder(
                input_ids=input_ids,
                # Only its being there matters: the keys and values made of it are replaced, and fall away.
                encoder_hidden_states=torch.zeros(1, 1, model.config.d_model),
                use_cache=False,
            ).last_hidden_state[:, -1:]
        if getattr(model.config, "scale_decoder_outputs", False):
            hidden = hidden * model.config.d_model**-0.5
        logits = model.get_output_embeddings()(hidden)
        if self.logits_bias is not None:
            logits = logits + self.logits_bias
        return (logits, *[tensor for layer in sorted(trace.present) for tensor in trace.present[layer]])


def export_encoder(model: Any, family: Seq2SeqFamily) -> ir.Model:
    """The encoder graph, before virtual tokens are grafted: names and shapes as in docs/graph-contract.md."""
    size = geometry_of(model.config)
    batch, length, past = 2, 5, 3
    # Deep prompts have a meaning where positions are distances; absolute ones have no use in anybody's training.
    layers = size.num_encoder_layers if family.relative_positions else 0
    if not layers:
        past = 0
    sample = (
        torch.randint(0, size.vocab_size, (batch, length)),
        torch.ones(batch, past + length, dtype=torch.int64),
        [_kv(batch, size.num_attention_heads, past, size.head_size) for _ in range(layers)],
    )
    dynamic = (
        {0: "batch_size", 1: "sequence_length"},
        {0: "batch_size", 1: "total_sequence_length"},
        [({0: "batch_size", 2: "past_sequence_length"},) * 2] * layers,
    )
    inputs = [names.INPUT_IDS, names.ATTENTION_MASK]
    inputs += [names.past(layer, part) for layer in range(layers) for part in PARTS]
    outputs = [names.ENCODER_HIDDEN_STATES]
    outputs += [names.cross_present(layer, part) for layer in range(size.num_layers) for part in PARTS]
    return _export(EncoderGraph(model, family), sample, dynamic, inputs, outputs)


def export_decoder(model: Any, family: Seq2SeqFamily) -> ir.Model:
    """The decoder graph: names and shapes as in docs/graph-contract.md."""
    size = geometry_of(model.config)
    batch, length, past, source = 2, 5, 3, 7
    kv = (batch, size.num_key_value_heads)
    sample = (
        torch.randint(0, size.vocab_size, (batch, length)),
        torch.ones(batch, past + length, dtype=torch.int64),
        torch.ones(batch, source, dtype=torch.int64),
        [_kv(*kv, past, size.head_size) for _ in range(size.num_layers)],
        [_kv(*kv, source, size.head_size) for _ in range(size.num_layers)],
    )
    dynamic = (
        {0: "batch_size", 1: "sequence_length"},
        {0: "batch_size", 1: "total_sequence_length"},
        {0: "batch_size", 1: "encoder_sequence_length"},
        [({0: "batch_size", 2: "past_sequence_length"},) * 2] * size.num_layers,
        [({0: "batch_size", 2: "encoder_sequence_length"},) * 2] * size.num_layers,
    )
    every = [(layer, part) for layer in range(size.num_layers) for part in PARTS]
    inputs = [names.INPUT_IDS, names.ATTENTION_MASK, names.ENCODER_ATTENTION_MASK]
    inputs += [names.past(*one) for one in every] + [names.cross_past(*one) for one in every]
    outputs = [names.LOGITS, *(names.present(*one) for one in every)]
    return _export(DecoderGraph(model, family), sample, dynamic, inputs, outputs)


def _export(
    graph: _Graph, sample: tuple[Any, ...], dynamic: tuple[Any, ...], inputs: list[str], outputs: list[str]
) -> ir.Model:
    try:
        with _standing_in(graph.eval()), torch.no_grad(), quiet_export():
            program = torch.onnx.export(
                graph,
                sample,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"torch cannot export {graph.model.config.model_type}: {reason}") from error
    assert program is not None
    return program.model


_current: list[_Graph] = []
"""The graph being traced: transformers keeps what is registered for good, so it must not be the model."""


def _attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _current[-1].attend(*args, **kwargs)


@contextmanager
def _standing_in(graph: _Graph) -> Iterator[None]:
    """Put the graph's attention in place of the model's own, and restore."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    configs = {id(module.config): module.config for module in graph.model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    _current.append(graph)
    graph.model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        _current.remove(graph)
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextmanager
def _positions(stack: Any, mask: Tensor, length: int) -> Iterator[None]:
    """Let a stack with absolute positions count each row's own, from its mask, behind its own past."""
    table = getattr(stack, "embed_positions", None)
    if table is None:
        yield
        return
    positions = (mask.cumsum(1) - 1)[:, -length:].clamp(min=0) + getattr(table, "offset", 0)
    table.forward = lambda *args, **kwargs: torch.nn.functional.embedding(positions, table.weight)
    try:
        yield
    finally:
        del table.forward


def _flat(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _kv(batch: int, heads: int, length: int, head_size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, length, head_size), torch.randn(batch, heads, length, head_size)
