"""Proves an encoder-decoder package: both graphs, run as the runtime runs them, against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from edgeprompt.base.load import LoadedBase
from edgeprompt.engines.seq2seq.graphs import Seq2SeqGraphs, SourceRow
from edgeprompt.errors import ValidationError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.validate.decoder import LEAST_CORRELATION, TOLERANCE

Floats = npt.NDArray[np.float32]
STEPS = 6
_REFERENCE = "edgeprompt_encoder_prefix"
_TEXTS = (
    "The film starts slowly, but the last half hour is worth the ticket.",
    "Paris is the capital of France.",
    "She opened the old box and found a letter.",
)


@dataclass(frozen=True)
class Row:
    """One request: what the encoder reads, and the decoder's prefix and tokens."""

    source: SourceRow
    prefix: npt.NDArray[Any] | None
    tokens: Sequence[int]


def validate_seq2seq(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...]
) -> dict[str, Any]:
    """Compare step by step, rows alone and in mixed batches; PyTorch always runs a row alone and without padding.

    Raises:
        ValidationError: values or greedy tokens differ by more than the precision allows.
    """
    package = Package(folder, manifest)
    graphs = Seq2SeqGraphs(package, Sessions(package, EngineOptions(provider="cpu")))
    plain, virtual, deep, encoder_deep = _rows(loaded, manifest, graphs.has_encoder_prefix)
    mixed = [plain, virtual, deep, *([encoder_deep] if encoder_deep else [])]
    alone = [[row] for row in mixed]
    # Rows of a dynamically quantised batch share their scales, so the runtime runs them alone.
    batches = alone if manifest.precision == "int8" else [*alone, mixed]
    measured: dict[str, Any] = _measure([pair for batch in batches for pair in _compare(loaded, graphs, batch)])
    measured["prompts"] = {
        prompt.name: _measure(_compare(loaded, graphs, [_with_prompt(prompt, plain, manifest)])) for prompt in prompts
    }
    for name, found in (("the base", measured), *measured["prompts"].items()):
        _judge(name, found, manifest.precision)
    return measured


def reference_logits(loaded: LoadedBase, row: Row) -> Floats:
    """PyTorch's logits `[len(tokens), vocab_size]` behind each of a row's decoder tokens."""
    model = loaded.model
    cache = None
    if row.prefix is not None:
        layers = [tuple(torch.from_numpy(part)[None] for part in layer) for layer in row.prefix.astype(np.float32)]
        cache = EncoderDecoderCache(DynamicCache(layers), DynamicCache())
    prefix = row.source.prefix
    with torch.no_grad(), _encoder_prefix(loaded, prefix) if prefix is not None else nullcontext():
        logits = model(
            inputs_embeds=_embed(model, row.source),
            decoder_input_ids=torch.tensor([list(row.tokens)]),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    found: Floats = logits[0].numpy()
    return found


def _embed(model: Any, source: SourceRow) -> torch.Tensor:
    vocab = model.config.vocab_size
    ids = torch.from_numpy(source.ids)
    virtual = ids >= vocab
    embedded: torch.Tensor = model.get_input_embeddings()(torch.where(virtual, 0, ids))
    # Pegasus and Marian scale behind their lookup, where inputs_embeds no longer pass.
    embedded = embedded * getattr(model.get_encoder(), "embed_scale", 1.0)
    if source.table is not None:
        embedded[virtual] = torch.from_numpy(source.table.astype(np.float32))[ids[virtual] - vocab]
    return embedded[None]


@contextmanager
def _encoder_prefix(loaded: LoadedBase, prefix: Floats) -> Iterator[None]:
    """Deep prompts in T5's encoder as OpenPrompt runs them: text stands behind the prefix, at its length."""
    modules = loaded.family.attentions(loaded.model).encoder
    layer_of = {id(module): layer for layer, module in enumerate(modules)}

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, position_bias: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        if id(module) in layer_of:
            past = torch.from_numpy(prefix[layer_of[id(module)]].astype(np.float32))[:, None]
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
            total = key.shape[2]
            position_bias = modules[0].compute_bias(total, total)[:, :, -query.shape[2] :]
            mask = None
        scores = query @ key.transpose(2, 3) + position_bias
        if mask is not None:
            scores = scores + mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register(_REFERENCE, attend)
    AttentionMaskInterface.register(_REFERENCE, eager_mask)
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation(_REFERENCE)
    try:
        yield
    finally:
        loaded.model.set_attn_implementation(before)
        AttentionInterface.register(_REFERENCE, _unused)


def _unused(*_: Any, **__: Any) -> None:
    """What stays registered: not a closure over the model."""


def _rows(loaded: LoadedBase, manifest: Manifest, encoder_prefix: bool) -> tuple[Row, Row, Row, Row | None]:
    """A plain row, one with virtual tokens, one with a decoder prefix, and one with encoder deep prompts."""
    size, generator = manifest.geometry, np.random.default_rng(0)
    texts = _text_ids(loaded, size.vocab_size)
    start = manifest.tokens.decoder_start if manifest.tokens.decoder_start is not None else manifest.tokens.bos or 0

    def noise(*shape: int) -> Floats:
        return generator.standard_normal(shape).astype(np.float32)

    def row(text: npt.NDArray[np.int64], **parts: Any) -> Row:
        said = generator.integers(0, size.vocab_size, STEPS - 1)
        source = SourceRow(text, parts.get("table"), parts.get("encoder_prefix"))
        return Row(source, parts.get("prefix"), [start, *said.tolist()])

    spread = float(_embed(loaded.model, SourceRow(texts[0])).std())
    virtual = np.concatenate([size.vocab_size + np.arange(5), texts[1]])
    kv = (2, size.num_key_value_heads)
    deep = row(texts[2], prefix=noise(size.num_layers, *kv, 4, size.head_size))
    encoder_deep = None
    if encoder_prefix:
        encoder_deep = row(
            texts[0],
            encoder_prefix=noise(size.num_encoder_layers, *kv, 3, size.head_size),
            prefix=noise(size.num_layers, *kv, 2, size.head_size),
        )
    return row(texts[0]), row(virtual, table=noise(5, size.hidden_size) * spread), deep, encoder_deep


def _with_prompt(prompt: PromptFile, like: Row, manifest: Manifest) -> Row:
    table, ids = prompt.prompt_embeddings, like.source.ids
    if table is not None:
        ids = np.concatenate([manifest.geometry.vocab_size + np.arange(len(table)), ids])
    return Row(SourceRow(ids, table, prompt.encoder_past_key_values), prompt.past_key_values, like.tokens)


def _text_ids(loaded: LoadedBase, vocab_size: int) -> list[npt.NDArray[np.int64]]:
    if loaded.tokenizer is not None:
        texts = [np.array(loaded.tokenizer.encode(text), np.int64) for text in _TEXTS]
        if all(ids.size >= 3 and ids.max() < vocab_size for ids in texts):
            return texts
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, length, dtype=np.int64) for length in (12, 5, 9)]


def _compare(loaded: LoadedBase, graphs: Seq2SeqGraphs, rows: Sequence[Row]) -> list[tuple[Floats, Floats]]:
    """Pairs of logits, the package's and PyTorch's, for every step of every row of one batch."""
    state = graphs.begin(graphs.encode([row.source for row in rows]), [row.prefix for row in rows])
    steps = [graphs.step(state, [row.tokens[step] for row in rows]) for step in range(STEPS)]
    wanted = [reference_logits(loaded, row) for row in rows]
    return [(steps[step][index], wanted[index][step]) for index in range(len(rows)) for step in range(STEPS)]


def _measure(pairs: Sequence[tuple[Floats, Floats]]) -> dict[str, Any]:
    differences = [np.abs(got - want) for got, want in pairs]
    # Two tokens within rounding of each other are a tie that either side may decide.
    gaps = [float(want.max() - want[got.argmax()]) / float(np.abs(want).max()) for got, want in pairs]
    return {
        "comparisons": len(pairs),
        "max_difference": round(max(float(difference.max()) for difference in differences), 6),
        "mean_difference": round(float(np.mean([difference.mean() for difference in differences])), 6),
        "logit_scale": round(max(float(np.abs(want).max()) for _, want in pairs), 4),
        "top1_agreement": round(float(np.mean([gap <= 1e-4 for gap in gaps])), 4),
        "least_correlation": round(min(float(np.corrcoef(got, want)[0, 1]) for got, want in pairs), 5),
    }


def _judge(name: str, found: Mapping[str, Any], precision: str) -> None:
    tolerance = TOLERANCE.get(precision)
    if tolerance is None:
        if not found["least_correlation"] >= LEAST_CORRELATION:
            raise ValidationError(
                f"{precision} logits of {name} correlate with PyTorch's by {found['least_correlation']:.3f}, at least "
                f"{LEAST_CORRELATION} is needed; try another precision"
            )
        return
    allowed = tolerance * found["logit_scale"]
    if not found["max_difference"] <= allowed:
        raise ValidationError(
            f"{precision} logits of {name} differ from PyTorch's by {found['max_difference']:.3g}, allowed "
            f"{allowed:.3g} ({tolerance:g} of their scale {found['logit_scale']:.3g})"
        )
    if precision == "fp32" and found["top1_agreement"] < 1:
        raise ValidationError(f"fp32 tokens of {name} agree with PyTorch's in {found['top1_agreement']:.0%}, all must")
