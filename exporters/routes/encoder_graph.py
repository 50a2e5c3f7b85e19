"""The graph of an encoder-only model: a wrapper that PyTorch's exporter traces, and what its inputs are."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from edgeprompt import names
from edgeprompt.base.encoder_attention import Call, deep_prompts
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import ExportError
from exporters.quiet import quiet_export

OPSET = 20
Prefixes = list[tuple[Tensor, Tensor]]

_TEXT = {0: "batch_size", 1: "sequence_length"}
_AXES = {
    names.INPUT_IDS: _TEXT,
    names.ATTENTION_MASK: {0: "batch_size", 1: "total_sequence_length"},
    names.POSITION_IDS: _TEXT,
    names.TOKEN_TYPE_IDS: _TEXT,
    names.MASK_POSITIONS: {0: "batch_size"},
}
_PREFIX_AXES = {0: "batch_size", 2: "prefix_length"}


def input_names(loaded: LoadedBase) -> list[str]:
    """The int64 inputs of a base's graph, in order; `prompt_embeddings` and the prefixes come on top."""
    found = [names.INPUT_IDS, names.ATTENTION_MASK]
    if loaded.family.position_ids and not _relative_only(loaded.config):
        found.append(names.POSITION_IDS)
    if getattr(loaded.config, "type_vocab_size", 0) > 1:
        found.append(names.TOKEN_TYPE_IDS)
    if has_logits(loaded):
        found.append(names.MASK_POSITIONS)
    return found


def output_names(loaded: LoadedBase) -> list[str]:
    """The outputs of a base's graph, in order."""
    pooled = getattr(loaded.model.base_model, "pooler", None) is not None
    found = [names.LAST_HIDDEN_STATE, *([names.POOLER_OUTPUT] if pooled else [])]
    return [*found, names.LOGITS] if has_logits(loaded) else found


def has_logits(loaded: LoadedBase) -> bool:
    """Whether the base is a masked language model."""
    return loaded.model is not loaded.model.base_model


def _relative_only(config: Any) -> bool:
    return getattr(config, "position_biased_input", True) is False


class EncoderGraph(torch.nn.Module):
    """A base encoder as a function of the contract's tensors."""

    def __init__(self, loaded: LoadedBase, *, fused: bool) -> None:
        super().__init__()
        self.model = loaded.model
        self.family = loaded.family
        self.outputs = output_names(loaded)
        self.fused = fused

    def forward(
        self, inputs: dict[str, Tensor], prefixes: Prefixes, embeddings: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run the base.

        Args:
            inputs: Tensors by the names of `input_names`.
            prefixes: Per layer, keys and values `[batch_size, num_heads, prefix_length, head_size]`.
            embeddings: `[batch_size, sequence_length, embedding_size]` instead of the ids' own (reference runs; in a
                graph, virtual tokens are grafted behind the table).

        Returns:
            Tensors by the names of `output_names`; logits `[batch_size, vocab_size]` at `mask_positions`.
        """
        rest = {name: inputs[name] for name in (names.POSITION_IDS, names.TOKEN_TYPE_IDS) if name in inputs}
        rest["inputs_embeds" if embeddings is not None else names.INPUT_IDS] = (
            embeddings if embeddings is not None else inputs[names.INPUT_IDS]
        )
        mask = inputs[names.ATTENTION_MASK]
        base = self.model.base_model
        with self.family.patch(base), deep_prompts(base, Call(prefixes, mask, fused=self.fused)):
            # Models without the interface read the mask as well; they know the text's part alone.
            length = inputs[names.INPUT_IDS].shape[1]
            found = base(attention_mask=mask[:, mask.shape[1] - length :], **rest)
        results = [found.last_hidden_state]
        if names.POOLER_OUTPUT in self.outputs:
            results.append(found.pooler_output)
        if names.LOGITS in self.outputs:
            rows = torch.arange(found.last_hidden_state.shape[0])
            results.append(
                self.family.lm_logits(self.model, found.last_hidden_state[rows, inputs[names.MASK_POSITIONS]])
            )
        return tuple(results)


def trace_graph(loaded: LoadedBase) -> ir.Model:
    """Export the base to ONNX, in float32 and without virtual tokens.

    Raises:
        ExportError: PyTorch's exporter failed.
    """
    geometry = geometry_of(loaded.config)
    layers, heads, size = geometry.num_layers, geometry.num_attention_heads, geometry.head_size
    # Distinct sizes, none of them 1: the exporter takes equal sizes for one dimension, and 1 for a constant.
    batch, length, prefix = 2, 7, 3
    samples = {
        names.INPUT_IDS: torch.arange(batch * length).reshape(batch, length) % geometry.vocab_size,
        names.ATTENTION_MASK: torch.ones(batch, prefix + length, dtype=torch.int64),
        names.POSITION_IDS: torch.arange(length).expand(batch, length) + geometry.position_offset,
        names.TOKEN_TYPE_IDS: torch.zeros(batch, length, dtype=torch.int64),
        names.MASK_POSITIONS: torch.arange(batch),
    }
    plain = input_names(loaded)
    sample = {name: samples[name] for name in plain}
    shape = (batch, heads, prefix, size)
    prefixes = [(torch.randn(shape), torch.randn(shape)) for _ in range(layers)]
    past = [names.past(layer, part) for layer in range(layers) for part in ("key", "value")]
    try:
        with torch.no_grad(), quiet_export():
            program = torch.onnx.export(
                EncoderGraph(loaded, fused=True),
                (sample, prefixes),
                dynamo=True,
                opset_version=OPSET,
                input_names=[*plain, *past],
                output_names=output_names(loaded),
                dynamic_shapes=({name: _AXES[name] for name in plain}, [(_PREFIX_AXES, _PREFIX_AXES)] * layers),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        reason = error.__cause__ or error
        message = " ".join(str(reason).split())[:300]
        raise ExportError(
            f"PyTorch could not export {loaded.name!r} ({loaded.config.model_type}): {message}"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of this machine
    return model
