"""Proves an encoder-decoder package: both graphs, run as the runtime runs them, against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from edgeprompt.base.decoder_graph import embed
from edgeprompt.base.load import LoadedBase
from edgeprompt.engines.seq2seq.graphs import Seq2SeqGraphs, SourceRow
from edgeprompt.errors import ValidationError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.validate.core import Comparison, Floats, Ids, prove, sample_ids
from exporters.validate.quality import PREDICTIONS, Prediction

STEPS = 6
_REFERENCE = "edgeprompt_encoder_prefix"


@dataclass(frozen=True)
class Row:
    """One request: what the encoder reads, and the decoder's prefix and tokens."""

    source: SourceRow
    prefix: npt.NDArray[Any] | None
    tokens: Sequence[int]


def validate_seq2seq(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
) -> dict[str, Any]:
    """Compare step by step, rows alone and in mixed batches; PyTorch always runs a row alone and without padding.

    Raises:
        ValidationError: values or greedy tokens differ by more than the precision allows.
    """
    measured = prove(_Seq2Seq(loaded, Package(folder, manifest), prompts), loaded, folder, manifest, data)
    measured.setdefault("prompts", {})
    for name, found in (("the base", measured), *measured["prompts"].items()):
        if manifest.precision == "fp32" and found["top1_agreement"] < 1:
            raise ValidationError(
                f"fp32 tokens of {name} agree with PyTorch's in {found['top1_agreement']:.0%}, all must"
            )
    return measured


class _Seq2Seq:
    def __init__(self, loaded: LoadedBase, package: Package, prompts: tuple[PromptFile, ...]) -> None:
        self.loaded, self.manifest, self.prompts = loaded, package.manifest, prompts
        self.graphs = Seq2SeqGraphs(package, Sessions(package, EngineOptions(provider="cpu")))

    def comparisons(self) -> Iterator[Comparison]:
        """Logits of every step of rows alone, of a mixed batch, and behind real prompts."""
        plain, virtual, deep, encoder_deep = _rows(self.loaded, self.manifest, self.graphs.has_encoder_prefix)
        mixed = [plain, virtual, deep, *([encoder_deep] if encoder_deep else [])]
        # Rows of a dynamically quantised batch share their scales, so the runtime runs them alone.
        for batch in [[row] for row in mixed] + ([] if self.manifest.precision == "int8" else [mixed]):
            yield from self._compare("", batch)
        for prompt in self.prompts:
            yield from self._compare(f"prompts.{prompt.name}", [_with_prompt(prompt, plain, self.manifest)])

    def predictions(self, ids: Ids) -> Iterator[Prediction]:
        """The text's first tokens, said by the decoder one after another while the encoder holds the text."""
        count = min(PREDICTIONS, len(ids))
        row = Row(SourceRow(ids), None, [_start(self.manifest), *ids[: count - 1].tolist()])
        for step, (got, want) in enumerate(self._logits([row])[0]):
            yield Prediction(got, want, int(ids[step]))

    def _compare(self, what: str, rows: Sequence[Row]) -> Iterator[Comparison]:
        for pairs in self._logits(rows):
            yield from (Comparison(what, got, want) for got, want in pairs)

    def _logits(self, rows: Sequence[Row]) -> list[list[tuple[Floats, Floats]]]:
        """For every row of one batch, the package's logits and PyTorch's at each of its steps."""
        state = self.graphs.begin(self.graphs.encode([row.source for row in rows]), [row.prefix for row in rows])
        steps = [self.graphs.step(state, list(tokens)) for tokens in zip(*(row.tokens for row in rows), strict=True)]
        return [
            [(steps[at][index], want) for at, want in enumerate(reference_logits(self.loaded, row))]
            for index, row in enumerate(rows)
        ]


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
    # Pegasus and Marian scale behind their lookup, where inputs_embeds no longer pass.
    scale = getattr(model.get_encoder(), "embed_scale", 1.0)
    return embed(model, source.ids, source.table, model.config.vocab_size, scale)


def _start(manifest: Manifest) -> int:
    tokens = manifest.tokens
    return tokens.decoder_start if tokens.decoder_start is not None else tokens.bos or 0


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
    texts = sample_ids(loaded, size, (12, 5, 9))

    def noise(*shape: int) -> Floats:
        return generator.standard_normal(shape).astype(np.float32)

    def row(text: npt.NDArray[np.int64], **parts: Any) -> Row:
        said = generator.integers(0, size.vocab_size, STEPS - 1)
        source = SourceRow(text, parts.get("table"), parts.get("encoder_prefix"))
        return Row(source, parts.get("prefix"), [_start(manifest), *said.tolist()])

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
        ids = ids[: manifest.geometry.max_positions or None]
    return Row(SourceRow(ids, table, prompt.encoder_past_key_values), prompt.past_key_values, like.tokens)
