"""Compares a grafted package with its base in PyTorch, through inputs that every exporter's graphs have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt import names
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import ValidationError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.validate.decoder import LEAST_CORRELATION, TOLERANCE
from exporters.validate.onnx_graphs import open_graph, run_known

Array = npt.NDArray[Any]
_LENGTHS = (15, 6, 2)


def compare_with_base(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...]
) -> dict[str, Any]:
    """Largest difference over random texts without a prompt, behind random virtual rows, and behind `prompts`.

    Compared are the last position's logits of decoders, every hidden state of encoders, and the first decoder step's
    logits of encoder-decoders. Prefixes are compared where PyTorch takes them (decoders).

    Raises:
        ValidationError: a difference is larger than the precision allows.
    """
    measure = {
        names.DECODER_ONLY: _decoder,
        names.ENCODER_ONLY: _encoder,
        names.ENCODER_DECODER: _seq2seq,
    }[manifest.architecture]
    sessions = {key: open_graph(folder / graph.file) for key, graph in manifest.graphs.items()}
    pairs = [
        measure(loaded.model, sessions, manifest, ids, rows, prefix)
        for ids, rows, prefix in _cases(loaded, manifest, prompts)
    ]
    worst = max(float(np.abs(got - want).max()) for got, want in pairs)
    scale = max(float(np.abs(want).max()) for _, want in pairs)
    closest = min(float(np.corrcoef(got.ravel(), want.ravel())[0, 1]) for got, want in pairs)
    tolerance = TOLERANCE.get(manifest.precision)
    if (tolerance is not None and not worst <= tolerance * scale) or not closest >= LEAST_CORRELATION:
        raise ValidationError(
            f"the {manifest.precision} graph differs from {loaded.name!r} in PyTorch by {worst:.3g} of {scale:.3g}, "
            f"correlation {closest:.3f}; was it exported from this base?"
        )
    return {
        "comparisons": len(pairs),
        "max_difference": round(worst, 6),
        "scale": round(scale, 4),
        "least_correlation": round(closest, 5),
    }


def _cases(
    loaded: LoadedBase, manifest: Manifest, prompts: tuple[PromptFile, ...]
) -> Iterator[tuple[Array, Array, Array | None]]:
    """Ids with virtual ones in front, their rows, and a prefix."""
    random = np.random.default_rng(0)
    size = manifest.geometry
    with torch.no_grad():
        sample = loaded.model.get_input_embeddings()(torch.arange(min(64, size.vocab_size)))
    width, spread = sample.shape[-1], float(sample.std())
    nothing = np.zeros((1, width), np.float32)
    for length in _LENGTHS:
        yield random.integers(0, size.vocab_size, length), nothing, None
    given: list[tuple[Array | None, Array | None]] = [(random.standard_normal((4, width)) * spread, None)]
    given += [(p.prompt_embeddings, None) for p in prompts if p.prompt_embeddings is not None]
    if manifest.architecture == names.DECODER_ONLY:
        given += [(None, p.past_key_values) for p in prompts if p.past_key_values is not None]
    for rows, prefix in given:
        text = random.integers(0, size.vocab_size, _LENGTHS[0])
        if prefix is not None:
            yield text, nothing, prefix.astype(np.float32)
        elif rows is not None:
            yield np.concatenate([size.vocab_size + np.arange(len(rows)), text]), rows.astype(np.float32), None


def _embed(model: Any, ids: Array, rows: Array, manifest: Manifest) -> torch.Tensor:
    index = torch.from_numpy(ids)
    virtual = index >= manifest.geometry.vocab_size
    embedded: torch.Tensor = model.get_input_embeddings()(torch.where(virtual, 0, index))
    table = torch.from_numpy(rows)[torch.where(virtual, index - manifest.geometry.vocab_size, 0)]
    return torch.where(virtual[:, None], table, embedded)[None]


def _feeds(ids: Array, rows: Array, past: int) -> dict[str, Array]:
    return {
        names.INPUT_IDS: ids[None],
        names.ATTENTION_MASK: np.ones((1, past + len(ids)), np.int64),
        names.POSITION_IDS: np.arange(past, past + len(ids))[None],
        names.TOKEN_TYPE_IDS: np.zeros((1, len(ids)), np.int64),
        names.PROMPT_EMBEDDINGS: rows,
    }


def _past(manifest: Manifest, prefix: Array | None) -> dict[str, Array]:
    size = manifest.geometry
    if prefix is None:
        prefix = np.zeros((size.num_layers, 2, size.num_key_value_heads, 0, size.head_size))
    return {
        names.past(layer, part): prefix[layer, index][None].astype(manifest.kv_dtype)
        for layer in range(size.num_layers)
        for index, part in enumerate(("key", "value"))
    }


def _decoder(
    model: Any, sessions: dict[str, Any], manifest: Manifest, ids: Array, rows: Array, prefix: Array | None
) -> tuple[Array, Array]:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, pair in enumerate(() if prefix is None else prefix):
        cache.update(torch.from_numpy(pair[0])[None], torch.from_numpy(pair[1])[None], layer)
    with torch.no_grad():
        want = model(inputs_embeds=_embed(model, ids, rows, manifest), past_key_values=cache).logits[0, -1]
    past = 0 if prefix is None else prefix.shape[3]
    got = run_known(sessions["model"], {**_feeds(ids, rows, past), **_past(manifest, prefix)})[names.LOGITS][0, -1]
    return got.astype(np.float32), want[: len(got)].numpy()


def _encoder(
    model: Any, sessions: dict[str, Any], manifest: Manifest, ids: Array, rows: Array, prefix: Array | None
) -> tuple[Array, Array]:
    with torch.no_grad():
        want = model.base_model(inputs_embeds=_embed(model, ids, rows, manifest)).last_hidden_state[0]
    got = run_known(sessions["model"], _feeds(ids, rows, 0))[names.LAST_HIDDEN_STATE][0]
    return got.astype(np.float32), want.numpy()


def _seq2seq(
    model: Any, sessions: dict[str, Any], manifest: Manifest, ids: Array, rows: Array, prefix: Array | None
) -> tuple[Array, Array]:
    start = np.array([[manifest.tokens.decoder_start or 0]], np.int64)
    embedded = _embed(model, ids, rows, manifest)
    with torch.no_grad():
        want = model(inputs_embeds=embedded, decoder_input_ids=torch.from_numpy(start)).logits[0, -1]
    encoded = run_known(sessions["encoder"], _feeds(ids, rows, 0))
    cross = {name.replace("present", "past_key_values"): value for name, value in encoded.items()}
    step = {names.INPUT_IDS: start, names.ATTENTION_MASK: np.ones((1, 1), np.int64)}
    step[names.ENCODER_ATTENTION_MASK] = np.ones((1, len(ids)), np.int64)
    got = run_known(sessions["decoder"], {**cross, **_past(manifest, None), **step})[names.LOGITS][0, -1]
    return got.astype(np.float32), want.numpy()
