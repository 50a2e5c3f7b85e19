"""Proves an encoder package: the graph in ONNX Runtime, fed as the runtime feeds it, against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprompt import names
from edgeprompt.base.decoder_graph import embed
from edgeprompt.base.load import LoadedBase
from edgeprompt.engines.encoder.batch import Row, make_feeds, make_row
from edgeprompt.errors import ValidationError
from edgeprompt.ort.session import graph_inputs, open_session
from edgeprompt.package.manifest import Manifest
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.encoder_text import encode_text
from edgeprompt.prompts.file import PromptFile
from exporters.routes.encoder_graph import EncoderGraph, input_names, output_names
from exporters.validate.core import Comparison, Floats, Ids, prove, sample_ids
from exporters.validate.quality import Prediction

MASKED = 4
"""Tokens of a text that are masked, one at a time."""
_SLOT = "The plot is thin and the jokes fall flat."
"""What stands in a prompt's slots where it has no golden example."""


def validate_encoder(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
) -> dict[str, Any]:
    """Compare over texts without a prompt, with virtual tokens, and in a batch of deep prompts of mixed length.

    Every row of a batch is compared with PyTorch running that row alone: without padding, and without any of our code
    where the row has no deep prompt.

    Raises:
        ValidationError: names or values differ by more than the precision allows.
    """
    encoder = _Encoder(loaded, folder, manifest, prompts)
    measured = prove(encoder, loaded, folder, manifest, data)
    return {"rows": sum(map(len, encoder.batches)), "prompts": [prompt.name for prompt in prompts], **measured}


class _Encoder:
    def __init__(self, loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...]) -> None:
        self.loaded, self.manifest = loaded, manifest
        self.session = open_session(folder / manifest.graphs["model"].file, provider="cpu").ort
        self.inputs = [value.name for value in graph_inputs(self.session)]
        self.outputs = [value.name for value in self.session.get_outputs()]
        expected = {*input_names(loaded), names.PROMPT_EMBEDDINGS}
        lacking = sorted((expected - set(self.inputs)) | (set(output_names(loaded)) - set(self.outputs)))
        if lacking and not (lacking == [names.PROMPT_EMBEDDINGS] and manifest.prompt_input == "optional"):
            raise ValidationError(f"the graph lacks {', '.join(lacking)}")
        self.batches = [*_batches(loaded, manifest)]
        if prompts:
            self.batches.append([_golden_row(prompt, folder, manifest) for prompt in prompts])

    def comparisons(self) -> Iterator[Comparison]:
        """Every output of every row, with padding cut off."""
        for rows in self.batches:
            found = self._run(rows)
            for index, row in enumerate(rows):
                for name, want in reference(self.loaded, row, self.manifest).items():
                    got = found[name][index]
                    yield Comparison(name, got[: row.length] if name == names.LAST_HIDDEN_STATE else got, want)

    def predictions(self, ids: Ids) -> Iterator[Prediction]:
        """The text's embedding; where the base has a masked-language-model head, tokens behind a mask."""
        row = make_row(ids.tolist(), self.manifest.geometry.vocab_size)
        got, want = self._run([row]), reference(self.loaded, row, self.manifest)
        states = names.LAST_HIDDEN_STATE
        yield Prediction(self._pooled(got[states][0]), self._pooled(want[states]), None)
        mask = self.manifest.tokens.mask
        if mask is None or names.LOGITS not in self.outputs:
            return
        for at in sorted({*np.linspace(1, len(ids) - 2, MASKED + 2, dtype=int)[1:-1].tolist()} if len(ids) > 2 else ()):
            masked = np.where(np.arange(len(ids)) == at, mask, ids)
            row = make_row(masked.tolist(), self.manifest.geometry.vocab_size, mask_position=at)
            want = reference(self.loaded, row, self.manifest)
            yield Prediction(self._run([row])[names.LOGITS][0], want[names.LOGITS], int(ids[at]))

    def _run(self, rows: Sequence[Row]) -> dict[str, Floats]:
        found = self.session.run(self.outputs, make_feeds(rows, self.manifest, self.inputs))
        return dict(zip(self.outputs, found, strict=True))

    def _pooled(self, states: Floats) -> Floats:
        at = {"cls": 0, "last": -1}.get(self.manifest.pooling)
        pooled: Floats = states.mean(0) if at is None else states[at]
        return pooled


def reference(loaded: LoadedBase, row: Row, manifest: Manifest) -> dict[str, Floats]:
    """PyTorch's outputs for one row alone, without the batch dimension."""
    size = manifest.geometry
    embedded = embed(loaded.model, row.ids, row.embeddings, size.vocab_size)
    with torch.no_grad():
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
    texts = [ids.tolist() for ids in sample_ids(loaded, size)]
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


def _golden_row(prompt: PromptFile, folder: Path, manifest: Manifest) -> Row:
    fields = dict(prompt.golden.fields) if prompt.golden else dict.fromkeys(prompt.template.slots, _SLOT)
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
