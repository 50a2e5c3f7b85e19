"""The torch route: `torch.onnx.export` of the model's own code, with fused attention standing in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from edgeprompt import names
from edgeprompt.base.fused_attention import Step, fused, running
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.base.mapped import stand_ins
from edgeprompt.base.rope import rotary_size, scales_by_length
from edgeprompt.errors import ExportError
from exporters.contract import ExportOptions
from exporters.graft.fuse import fuse_graph
from exporters.quiet import quiet_export

_OPSET = 21
_BATCH, _LENGTH, _PAST = 2, 5, 4
"""Sample sizes: all different, none 0 or 1, so that no dimension is taken for a constant."""


class DecoderGraph(torch.nn.Module):
    """The graph contract as a module: flat KV inputs, logits of the last position, flat KV outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        """Logits [batch, 1, vocab_size] and the grown cache, layer by layer, key before value."""
        length, total = input_ids.shape[1], attention_mask.shape[1]
        seqlens = (attention_mask.sum(1, keepdim=True) - 1).to(torch.int32)
        # A tensor plus a symbolic size keeps the size symbolic in the graph.
        total_tensor = torch.tensor(0, dtype=torch.int32) + total
        step = Step(past, seqlens, total_tensor, total, attention_mask)
        with running(step):
            positions = (attention_mask.cumsum(1) - 1)[:, -length:].clamp(min=0)
            hidden = self.model.base_model(
                inputs_embeds=self.model.get_input_embeddings()(input_ids),
                use_cache=False,
                **self._positions(positions),
            ).last_hidden_state
        logits = self._head(hidden[:, -1:])
        return (logits, *(tensor for layer in sorted(step.present) for tensor in step.present[layer]))

    def _positions(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        import inspect

        takes = inspect.signature(self.model.base_model.forward).parameters
        return {names.POSITION_IDS: positions} if names.POSITION_IDS in takes else {}

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def build_graph(loaded: LoadedBase, options: ExportOptions, folder: Path, scratch: Path) -> ir.Model:
    """Trace the model; its weights are shared with PyTorch, nothing is copied or written.

    Raises:
        ExportError: torch cannot export this model.
    """
    geometry = geometry_of(loaded.config)
    layers = range(geometry.num_layers)
    kv_shape = (_BATCH, geometry.num_key_value_heads, _PAST, geometry.head_size)
    sample = (
        torch.randint(0, min(100, geometry.vocab_size), (_BATCH, _LENGTH)),
        torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64),
        [(torch.zeros(kv_shape), torch.zeros(kv_shape)) for _ in layers],
    )
    axes = {0: "batch_size", 2: "past_sequence_length"}
    dynamic = (
        {0: "batch_size", 1: "sequence_length"},
        {0: "batch_size", 1: "total_sequence_length"},
        [(axes, axes) for _ in layers],
    )
    rotated = rotary_size(loaded.config, geometry.head_size)
    rotary = loaded.family.fused_rotary and geometry.head_size % 16 == 0 and rotated % 16 == 0
    if scales_by_length(loaded.config) and not rotary:
        raise ExportError(
            f"{loaded.name!r} scales rotary positions by the text's length, which is written for heads of multiples of "
            f"16 in families that rotate inside the operator; it is a {loaded.config.model_type} with heads of "
            f"{geometry.head_size}: choose another base"
        )
    flat = [(layer, part) for layer in layers for part in ("key", "value")]
    try:
        with (
            # The operator rotates heads of a multiple of 16; others are rotated in front of it.
            fused(loaded.model, rotary=rotary),
            loaded.family.patch(loaded.model),
            torch.no_grad(),
            quiet_export(),
            stand_ins(loaded.model) as originals,
        ):
            program = torch.onnx.export(
                DecoderGraph(loaded.model).eval(),
                sample,
                dynamo=True,
                opset_version=_OPSET,
                input_names=[names.INPUT_IDS, names.ATTENTION_MASK, *(names.past(*item) for item in flat)],
                output_names=[names.LOGITS, *(names.present(*item) for item in flat)],
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"torch cannot export {loaded.name!r} ({loaded.config.model_type}): {reason}") from error
    assert program is not None
    _read_later(program.model, originals)
    fuse_graph(program.model)
    return program.model


def _read_later(model: ir.Model, originals: Mapping[int, torch.Tensor]) -> None:
    """Give initialisers that stand for mapped parameters these, each read when it is needed.

    torch transposes some of them, which leaves them where they are: their address says whose they are.

    Raises:
        ExportError: torch made something else of one, which would be zeros.
    """
    seen = set()
    for value in model.graph.initializers.values():
        held = getattr(value.const_value, "raw", None)
        array = held.detach() if isinstance(held, torch.Tensor) else held
        address = _address(array)
        if array is None or address not in originals:
            continue
        matrix = originals[address].detach()
        straight, turned = _strides(matrix), _strides(matrix)[::-1]
        if tuple(array.shape) == tuple(matrix.shape) and _strides(array) == straight:
            value.const_value = _lazily(matrix, str(value.name))
        elif tuple(array.shape) == tuple(matrix.shape)[::-1] and _strides(array) == turned:
            value.const_value = _lazily(matrix.T, str(value.name))
        else:
            continue
        seen.add(address)
    left = [list(matrix.shape) for address, matrix in originals.items() if address not in seen]
    if left:
        raise ExportError(f"torch left out or folded {len(left)} matrices of the base, one of {left[0]}")


def _address(array: Any) -> int:
    if isinstance(array, torch.Tensor):
        return array.data_ptr()
    return int(array.__array_interface__["data"][0]) if isinstance(array, np.ndarray) else 0


def _strides(array: Any) -> tuple[int, ...]:
    """In values."""
    if isinstance(array, torch.Tensor):
        return tuple(array.stride())
    return tuple(step // array.itemsize for step in array.strides)


def _lazily(matrix: torch.Tensor, name: str) -> ir.LazyTensor:
    def evaluate() -> TorchTensor:
        return TorchTensor(matrix.float(), name=name)

    return ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape(matrix.shape), name=name)
