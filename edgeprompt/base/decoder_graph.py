"""A decoder as plainly as possible, in ONNX Runtime and in PyTorch: what validation and tuning compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from edgeprompt import names
from edgeprompt.errors import PackageError, ValidationError
from edgeprompt.ort import processor
from edgeprompt.ort.session import graph_inputs
from edgeprompt.package.manifest import Manifest

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class DecoderGraph:
    """A decoder package's graph, run as plainly as possible: one call, one piece of a sequence."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Open the graph.

        Raises:
            PackageError: ONNX Runtime does not load it.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Between PyTorch's turns the graph's threads would spin for nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = "CUDAExecutionProvider" if "CUDAExecutionProvider" in ort.get_available_providers() else None
        providers = [provider, "CPUExecutionProvider"] if provider else ["CPUExecutionProvider"]
        # As the runtime opens it: signed 8-bit weights saturate on x86 without VNNI otherwise.
        options.add_session_config_entry("session.x64quantprecision", "1" if processor.saturates() else "0")
        file = manifest.graphs["model"].file
        try:
            self.session = ort.InferenceSession(folder / file, options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no common base
            raise PackageError(f"ONNX Runtime cannot load {file}: {' '.join(str(error).split())[:300]}") from error
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {value.name: value.shape for value in graph_inputs(self.session)}
        self.manifest = manifest
        self.kv_dtype = np.float16 if manifest.kv_dtype == "float16" else np.float32
        self._check_names()

    def _check_names(self) -> None:
        layers = range(self.manifest.geometry.num_layers)
        parts = [(layer, part) for layer in layers for part in ("key", "value")]
        inputs = {names.INPUT_IDS, names.ATTENTION_MASK, *(names.past(*part) for part in parts)}
        if self.manifest.prompt_input == "required":
            inputs.add(names.PROMPT_EMBEDDINGS)
        missing = sorted(inputs - set(self.inputs))
        missing += sorted({names.LOGITS, *(names.present(*part) for part in parts)} - set(self.outputs))
        if missing:
            raise ValidationError(f"the graph lacks {', '.join(missing)}")

    def empty_past(self, batch: int = 1) -> dict[str, npt.NDArray[Any]]:
        """A cache of length zero."""
        geometry = self.manifest.geometry
        shape = (batch, geometry.num_key_value_heads, 0, geometry.head_size)
        parts = [(layer, part) for layer in range(geometry.num_layers) for part in ("key", "value")]
        return {names.past(*part): np.zeros(shape, self.kv_dtype) for part in parts}

    def run(
        self,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.int64],
        past: Mapping[str, npt.NDArray[Any]],
        rows: Floats,
    ) -> tuple[Floats, dict[str, npt.NDArray[Any]]]:
        """Logits of the last position, [batch, vocab_size], and the cache grown by this piece."""
        result = self._outputs(ids, mask, past, rows)
        grown = {name: result[name.replace(names.PAST_KEY_VALUES, "present")] for name in past}
        return result[names.LOGITS][:, -1].astype(np.float32), grown

    def states(self, ids: npt.NDArray[np.int64], rows: Floats) -> Floats:
        """`hidden_states` of one row of ids, [sequence_length or 1, hidden_size]."""
        found = self._outputs(ids[None], np.ones((1, len(ids)), np.int64), self.empty_past(), rows)
        states: Floats = found[names.HIDDEN_STATES][0].astype(np.float32)
        return states

    def _outputs(
        self,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.int64],
        past: Mapping[str, npt.NDArray[Any]],
        rows: Floats,
    ) -> dict[str, npt.NDArray[Any]]:
        feeds = {names.INPUT_IDS: ids, names.ATTENTION_MASK: mask, **past}
        if names.PROMPT_EMBEDDINGS in self.inputs:
            feeds[names.PROMPT_EMBEDDINGS] = rows
        if names.POSITION_IDS in self.inputs:
            feeds[names.POSITION_IDS] = (np.maximum(mask.cumsum(1) - 1, 0))[:, -ids.shape[1] :]
        try:
            found = self.session.run(None, feeds)
        except Exception as error:  # onnxruntime's errors have no common base
            raise PackageError(f"the graph does not run: {' '.join(str(error).split())[:300]}") from error
        return dict(zip(self.outputs, found, strict=True))


def reference_logits(model: Any, ids: Ids, rows: Floats, past: Any = None) -> Floats:
    """PyTorch's logits behind one row of ids (virtual ones included), [vocab_size]; `past` is a transformers cache."""
    vocab = model.config.get_text_config().vocab_size
    last: Floats = all_logits(model, embed(model, ids, rows, vocab), past)[-1]
    return last


def all_logits(model: Any, embedded: torch.Tensor, past: Any = None) -> Floats:
    """Logits behind every position of one row of embeddings [1, length, hidden_size]: [length, vocab_size]."""
    with torch.no_grad():
        output = model(inputs_embeds=embedded, past_key_values=past, use_cache=past is not None)
    logits: Floats = output.logits[0, :, : model.config.get_text_config().vocab_size].float().numpy()
    return logits


def embed(model: Any, ids: Ids, rows: npt.NDArray[Any] | None, vocab_size: int, scale: float = 1.0) -> torch.Tensor:
    """`inputs_embeds [1, length, width]` of ids, those at or above `vocab_size` taken from `rows`.

    `scale` is what a model multiplies its lookups by where `inputs_embeds` no longer pass.
    """
    index = torch.from_numpy(ids)
    virtual = index >= vocab_size
    with torch.no_grad():
        embedded: torch.Tensor = model.get_input_embeddings()(torch.where(virtual, 0, index)) * scale
        if rows is not None:
            embedded[virtual] = torch.from_numpy(rows.astype(np.float32))[index[virtual] - vocab_size]
    return embedded[None]
