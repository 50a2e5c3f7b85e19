"""Compares a grafted package with its base in PyTorch, through inputs that every exporter's graphs have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt import names
from edgeprompt.base.decoder_graph import embed
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import ValidationError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.validate.core import Comparison, Floats, Ids, prove, random_rows
from exporters.validate.onnx_graphs import open_graph, run_known
from exporters.validate.quality import PREDICTIONS, Prediction

Array = npt.NDArray[Any]
_LENGTHS = (15, 6, 2)


def compare_with_base(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
) -> dict[str, Any]:
    """Random texts without a prompt, behind random virtual rows, and behind `prompts`; then real text.

    Compared are the last position's logits of decoders, every hidden state of encoders, and the first decoder step's
    logits of encoder-decoders. Prefixes are compared where PyTorch takes them (decoders).

    Raises:
        ValidationError: a difference is larger than the precision allows.
    """
    try:
        return prove(_Grafted(loaded, folder, manifest, prompts), loaded, folder, manifest, data)
    except ValidationError as error:
        raise ValidationError(f"{error}; was it exported from {loaded.name!r}?") from error


class _Grafted:
    def __init__(self, loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...]) -> None:
        self.model, self.manifest, self.prompts = loaded.model, manifest, prompts
        self.sessions = {key: open_graph(folder / graph.file) for key, graph in manifest.graphs.items()}
        self._run = {
            names.DECODER_ONLY: self._decoder,
            names.ENCODER_ONLY: self._encoder,
            names.ENCODER_DECODER: self._seq2seq,
        }[manifest.architecture]
        self.no_rows = np.zeros_like(random_rows(loaded.model, 1))

    def comparisons(self) -> Iterator[Comparison]:
        """One for every text."""
        for ids, rows, prefix in self._cases():
            got, want = self._run(ids, rows, prefix, [self.manifest.tokens.decoder_start or 0])
            yield Comparison("", got, want) if self._states else Comparison("", got[-1], want[-1])

    def predictions(self, ids: Ids) -> Iterator[Prediction]:
        """The last tokens of a text (encoder-decoders: the first), or an encoder's mean state."""
        if self._states:
            got, want = self._run(ids, self.no_rows, None, [])
            yield Prediction(got.mean(0), want.mean(0), None)
        elif self.manifest.architecture == names.ENCODER_DECODER:
            tokens = [self.manifest.tokens.decoder_start or 0, *ids[: min(PREDICTIONS, len(ids)) - 1].tolist()]
            for got, want, token in zip(*self._run(ids, self.no_rows, None, tokens), ids, strict=False):
                yield Prediction(got, want, int(token))
        else:
            for at in range(max(1, len(ids) - PREDICTIONS), len(ids)):
                got, want = self._run(ids[:at], self.no_rows, None, [])
                yield Prediction(got[-1], want[-1], int(ids[at]))

    @property
    def _states(self) -> bool:
        return self.manifest.architecture == names.ENCODER_ONLY

    def _cases(self) -> Iterator[tuple[Ids, Floats, Floats | None]]:
        """Ids with virtual ones in front, their rows, and a prefix."""
        random, vocab = np.random.default_rng(0), self.manifest.geometry.vocab_size
        for length in _LENGTHS:
            yield random.integers(0, vocab, length), self.no_rows, None
        given: list[tuple[Array | None, Array | None]] = [(random_rows(self.model, 4), None)]
        given += [(p.prompt_embeddings, None) for p in self.prompts if p.prompt_embeddings is not None]
        if self.manifest.architecture == names.DECODER_ONLY:
            given += [(None, p.past_key_values) for p in self.prompts if p.past_key_values is not None]
        for rows, prefix in given:
            text = random.integers(0, vocab, _LENGTHS[0])
            if prefix is not None:
                yield text, self.no_rows, prefix.astype(np.float32)
            elif rows is not None:
                yield np.concatenate([vocab + np.arange(len(rows)), text]), rows.astype(np.float32), None

    def _embed(self, ids: Ids, rows: Floats) -> torch.Tensor:
        return embed(self.model, ids, rows, self.manifest.geometry.vocab_size)

    def _feeds(self, ids: Ids, rows: Floats, past: int) -> dict[str, Array]:
        return {
            names.INPUT_IDS: ids[None],
            names.ATTENTION_MASK: np.ones((1, past + len(ids)), np.int64),
            names.POSITION_IDS: np.arange(past, past + len(ids))[None],
            names.TOKEN_TYPE_IDS: np.zeros((1, len(ids)), np.int64),
            names.PROMPT_EMBEDDINGS: rows,
        }

    def _past(self, prefix: Floats | None) -> dict[str, Array]:
        size = self.manifest.geometry
        filled = (
            np.zeros((size.num_layers, 2, size.num_key_value_heads, 0, size.head_size)) if prefix is None else prefix
        )
        return {
            names.past(layer, part): filled[layer, index][None].astype(self.manifest.kv_dtype)
            for layer in range(size.num_layers)
            for index, part in enumerate(("key", "value"))
        }

    def _decoder(self, ids: Ids, rows: Floats, prefix: Floats | None, tokens: list[int]) -> tuple[Floats, Floats]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, pair in enumerate(() if prefix is None else prefix):
            cache.update(torch.from_numpy(pair[0])[None], torch.from_numpy(pair[1])[None], layer)
        with torch.no_grad():
            want = self.model(inputs_embeds=self._embed(ids, rows), past_key_values=cache).logits[0]
        past = 0 if prefix is None else prefix.shape[3]
        feeds = {**self._feeds(ids, rows, past), **self._past(prefix)}
        got = run_known(self.sessions["model"], feeds)[names.LOGITS][0].astype(np.float32)
        return got, want[:, : got.shape[-1]].numpy()

    def _encoder(self, ids: Ids, rows: Floats, prefix: Floats | None, tokens: list[int]) -> tuple[Floats, Floats]:
        with torch.no_grad():
            want = self.model.base_model(inputs_embeds=self._embed(ids, rows)).last_hidden_state[0]
        got = run_known(self.sessions["model"], self._feeds(ids, rows, 0))[names.LAST_HIDDEN_STATE][0]
        return got.astype(np.float32), want.numpy()

    def _seq2seq(self, ids: Ids, rows: Floats, prefix: Floats | None, tokens: list[int]) -> tuple[Floats, Floats]:
        said = np.array([tokens], np.int64)
        with torch.no_grad():
            want = self.model(inputs_embeds=self._embed(ids, rows), decoder_input_ids=torch.from_numpy(said)).logits[0]
        encoded = run_known(self.sessions["encoder"], self._feeds(ids, rows, 0))
        cross = {name.replace("present", "past_key_values"): value for name, value in encoded.items()}
        step = {names.INPUT_IDS: said, names.ATTENTION_MASK: np.ones_like(said)}
        step[names.ENCODER_ATTENTION_MASK] = np.ones((1, len(ids)), np.int64)
        got = run_known(self.sessions["decoder"], {**cross, **self._past(None), **step})[names.LOGITS][0]
        return got.astype(np.float32), want.numpy()
