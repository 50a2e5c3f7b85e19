"""What a base's matrices are fed over calibration texts: which columns of their inputs are large, and which matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import DataError
from exporters.validate.quality import Ids, calibration_texts, encode_texts

MOST_TOKENS = 2048
"""Tokens of one pass, padding included."""


@dataclass
class Observed:
    """Statistics of inputs, for each parameter that is a matrix of a linear layer: a value for each of its columns."""

    largest: dict[str, torch.Tensor] = field(default_factory=dict)
    """Largest magnitude."""

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Count inputs [tokens, columns]."""
        largest = rows.abs().amax(0)
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest


def observe(loaded: LoadedBase, data: Any = None) -> Observed:
    """Run a decoder over calibration texts, each matrix read once for many of them.

    Args:
        loaded: The base; its matrices may lie in their files.
        data: The user's texts, as `exporters.validate.quality.read_texts` takes them; None: the shipped ones.

    A base that cannot read text is fed random token ids.

    Raises:
        DataError: `data` holds no text that the base can read.
    """
    geometry = geometry_of(loaded.config)
    source, texts = calibration_texts(data)
    encoded = encode_texts(loaded.tokenizer, texts, geometry.max_positions, geometry.vocab_size)
    if not encoded and data is not None:
        raise DataError(f"{source!r} cannot be read by the base's tokenizer: no text has two tokens it knows")
    if not encoded:
        random = np.random.default_rng(1)
        encoded = [random.integers(0, geometry.vocab_size, 24, dtype=np.int64) for _ in range(16)]
    observed = Observed()
    for batch in _batches(encoded):
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(batch):
            ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
        with _watched(loaded.model, observed, mask.bool()), torch.no_grad():
            loaded.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return observed


def _batches(texts: list[Ids]) -> Iterator[list[Ids]]:
    batch: list[Ids] = []
    for text in sorted(texts, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > MOST_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@contextmanager
def _watched(model: Any, observed: Observed, mask: torch.Tensor) -> Iterator[None]:
    """Count what linear layers are fed while this lasts, padding left out."""
    from transformers.pytorch_utils import Conv1D

    def watch(name: str) -> Any:
        def count(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].detach()
            # Experts see some tokens of the batch, in an order of their own.
            whole = rows.shape[:2] == mask.shape
            observed.add(name, rows[mask] if whole else rows.flatten(0, -2))

        return count

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def of_pieces(values: Mapping[str, torch.Tensor], pieces: list[tuple[str, int, bool]]) -> torch.Tensor | None:
    """The largest statistic of each column over the parameters that a weight consists of; None where one is unknown."""
    found = [values[name] for name, _, _ in pieces if name in values]
    if not pieces or len(found) < len(pieces):
        return None
    return torch.from_numpy(np.maximum.reduce([one.float().numpy() for one in found]))
