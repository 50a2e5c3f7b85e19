"""Proves an encoder package: the graph in ONNX Runtime, fed as the runtime feeds it, against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt import names
from edgeprompt.base.load import LoadedBase
from edgeprompt.engines.encoder.batch import Row, make_feeds, make_row
from edgeprompt.errors import ValidationError
from edgeprompt.ort.session import graph_inputs, open_session
from edgeprompt.package.manifest import Manifest
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.encoder_text import encode_text
from edgeprompt.prompts.file import PromptFile
from exporters.routes.encoder_graph import EncoderGraph, input_names, output_names
from exporters.validate.decoder import LEAST_CORRELATION, TOLERANCE

Floats = npt.NDArray[np.float32]

_TEXTS = (
    "A gripping, beautifully acted film that never lets go.",
    "The plot is thin and the jokes fall flat.",
    "The battery lasts two days, and the screen is bright enough for a sunny afternoon in the garden.",
)


def validate_encoder(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...]
) -> dict[str, Any]:
    """Compare over texts without a prompt, with virtual tokens, and in a batch of deep prompts of mixed length.

    Every row of a batch is compared with PyTorch running that row alone: without padding, and without any of our code
    where the row has no deep prompt.

    Raises:
        ValidationError: names or values differ by more than the precision allows.
    """
    session = open_session(folder / manifest.graphs["model"].file, provider="cpu").ort
    inputs = [value.name for value in graph_inputs(session)]
    outputs = [value.name for value in session.get_outputs()]
    expected = {*input_names(loaded), names.PROMPT_EMBEDDINGS}
    lacking = sorted((expected - set(inputs)) | (set(output_names(loaded)) - set(outputs)))
    if lacking and not (lacking == [names.PROMPT_EMBEDDINGS] and manifest.prompt_input == "optional"):
        raise ValidationError(f"the graph lacks {', '.join(lacking)}")
    batches = [*_batches(loaded, manifest)]
    if prompts:
        batches.append([_golden_row(prompt, folder, manifest) for prompt in prompts])
    measured: dict[str, dict[str, float]] = {}
    pairs: dict[str, list[tuple[Floats, Floats]]] = {name: [] for name in output_names(loaded)}
    for rows in batches:
        found = dict(zip(outputs, session.run(outputs, make_feeds(rows, manifest, inputs)), strict=True))
        for index, row in enumerate(rows):
            for name, want in reference(loaded, row, manifest).items():
                got = found[name][index]
                pairs[name].append((got[: row.length] if name == names.LAST_HIDDEN_STATE else got, want))
    for name, results in pairs.items():
        measured[name] = _compare(results)
        _judge(name, measured[name], manifest.precision)
    return {"rows": sum(map(len, batches)), "prompts": [prompt.name for prompt in prompts], **measured}


def reference(loaded: LoadedBase, row: Row, manifest: Manifest) -> dict[str, Floats]:
    """PyTorch's outputs for one row alone, without the batch dimension."""
    size = manifest.geometry
    ids = torch.from_numpy(row.ids)[None]
    virtual = ids >= size.vocab_size
    with torch.no_grad():
        embedded = loaded.model.get_input_embeddings()(torch.where(virtual, 0, ids))
        if row.embeddings is not None:
            embedded[virtual] = torch.from_numpy(row.embeddings.astype(np.float32))[ids[virtual] - size.vocab_size]
        feeds = make_feeds([row], manifest, input_names(loaded))
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
        if row.prefix is not None:
            prefix = torch.from_numpy(row.prefix.astype(np.float32))
            prefixes = [(layer[0][None], layer[1][None]) for layer in prefix]
            outputs = EncoderGraph(loaded, fused=False)(inputs, prefixes, embedded)
            return {name: value[0].numpy() for name, value in zip(output_names(loaded), outputs, strict=True)}
        rest = {name: inputs[name] for name in (names.POSITION_IDS, names.TOKEN_TYPE_IDS) if name in inputs}
        found = loaded.model.base_model(inputs_embeds=embedded, attention_mask=inputs[names.ATTENTION_MASK], **rest)
        results = {names.LAST_HIDDEN_STATE: found.last_hidden_state[0].numpy()}
        if names.POOLER_OUTPUT in output_names(loaded):
            results[names.POOLER_OUTPUT] = found.pooler_output[0].numpy()
        if names.LOGITS in output_names(loaded):
            logits = loaded.model(inputs_embeds=embedded, attention_mask=inputs[names.ATTENTION_MASK], **rest).logits
            results[names.LOGITS] = logits[0, row.mask_position].numpy()
    return results


def _batches(loaded: LoadedBase, manifest: Manifest) -> Iterator[list[Row]]:
    size = manifest.geometry
    texts = _text_ids(loaded, size.vocab_size)
    width = size.embedding_size or size.hidden_size
    generator = np.random.default_rng(0)
    spread = float(loaded.model.get_input_embeddings().weight.detach().std())
    tables = [(generator.standard_normal((count, width)) * spread).astype(np.float32) for count in (5, 2)]
    shape = (size.num_layers, 2, size.num_key_value_heads)
    deep = [generator.standard_normal((*shape, count, size.head_size)).astype(np.float32) for count in (4, 1)]

    def row(text: Sequence[int], table: Floats | None = None, prefix: Floats | None = None) -> Row:
        virtual = [] if table is None else range(size.vocab_size, size.vocab_size + len(table))
        ids = [*virtual, *text]
        types = [0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2)
        at = len(virtual) + 1
        return make_row(ids, size.vocab_size, type_ids=types, embeddings=table, prefix=prefix, mask_position=at)

    yield [row(texts[0])]
    yield [row(texts[0], tables[0]), row(texts[1], tables[1]), row(texts[2])]
    yield [row(texts[2], None, deep[0]), row(texts[0], None, deep[1]), row(texts[1]), row(texts[1], tables[0])]


def _text_ids(loaded: LoadedBase, vocab_size: int) -> list[list[int]]:
    if loaded.tokenizer is not None:
        texts = [list(loaded.tokenizer.encode(text)) for text in _TEXTS]
        if all(len(ids) >= 4 and max(ids) < vocab_size for ids in texts):
            return texts
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length).tolist() for length in (15, 13, 11)]


def _golden_row(prompt: PromptFile, folder: Path, manifest: Manifest) -> Row:
    fields = dict(prompt.golden.fields) if prompt.golden else dict.fromkeys(prompt.template.slots, _TEXTS[0])
    vocab = manifest.geometry.vocab_size
    count = 0 if prompt.prompt_embeddings is None else prompt.num_virtual_tokens
    encoded = encode_text(
        prompt.template,
        Tokenizer(folder, vocab),
        fields,
        num_virtual_tokens=count,
        first_virtual_id=vocab,
        add_special_tokens=prompt.add_special_tokens,
    )
    return make_row(
        encoded.ids,
        vocab,
        type_ids=encoded.type_ids,
        embeddings=prompt.prompt_embeddings,
        prefix=prompt.past_key_values,
    )


def _compare(results: Sequence[tuple[Floats, Floats]]) -> dict[str, float]:
    differences = np.concatenate([np.abs(got - want).ravel() for got, want in results])
    correlations = [float(np.corrcoef(got.ravel(), want.ravel())[0, 1]) for got, want in results]
    return {
        "max_difference": round(float(differences.max()), 6),
        "mean_difference": round(float(differences.mean()), 6),
        "scale": round(max(float(np.abs(want).max()) for _, want in results), 4),
        "least_correlation": round(min(correlations), 5),
    }


def _judge(name: str, measured: Mapping[str, float], precision: str) -> None:
    if not np.isfinite(measured["max_difference"]):
        raise ValidationError(f"{name} holds NaN or infinity")
    share = measured["max_difference"] / max(measured["scale"], 1e-9)
    limit = TOLERANCE.get(precision)
    if limit is not None and share > limit:
        raise ValidationError(
            f"{name} differs from PyTorch by {measured['max_difference']} at a scale of {measured['scale']}; "
            f"{precision} allows a share of {limit}"
        )
    if limit is None and not measured["least_correlation"] >= LEAST_CORRELATION:
        raise ValidationError(
            f"{name} correlates with PyTorch's by {measured['least_correlation']} only; at {precision} at least "
            f"{LEAST_CORRELATION} is needed: export at a higher precision"
        )
