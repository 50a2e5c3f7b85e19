"""Proves a decoder package: the graph in ONNX Runtime against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt import names
from edgeprompt.base.decoder_graph import DecoderGraph, all_logits, embed, reference_logits
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import ValidationError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.validate.core import Comparison, Floats, Ids, is_tie, prove, random_rows, sample_ids
from exporters.validate.quality import PREDICTIONS, Prediction

GREEDY_STEPS = 12


@dataclass(frozen=True)
class _Case:
    """One sequence: virtual rows and token ids in one row of ids, fed in pieces that end at `splits`."""

    ids: Ids
    splits: tuple[int, ...]


def validate_decoder(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
) -> dict[str, Any]:
    """Compare over several shapes, ragged batches and greedy tokens, with virtual rows and with real prompts.

    Raises:
        ValidationError: names, shapes, values or tokens differ by more than the precision allows.
    """
    subject = _Decoder(loaded, DecoderGraph(folder, manifest), prompts)
    measured = prove(subject, loaded, folder, manifest, data)
    measured["greedy_agreement"] = agreement = subject.greedy()
    measured.setdefault("prompts", {})
    if manifest.precision == "fp32" and agreement < 1:
        raise ValidationError(
            f"fp32 greedy tokens agree with PyTorch's in {agreement:.0%} of the steps, all must; no package was written"
        )
    return measured


class _Decoder:
    def __init__(self, loaded: LoadedBase, graph: DecoderGraph, prompts: tuple[PromptFile, ...]) -> None:
        self.model, self.graph, self.prompts = loaded.model, graph, prompts
        self.vocab = graph.manifest.geometry.vocab_size
        self.limit = graph.manifest.geometry.max_positions
        self.texts = sample_ids(loaded, graph.manifest.geometry)
        self.rows = random_rows(loaded.model)
        self.window = getattr(loaded.config.get_text_config(), "sliding_window", None)

    def comparisons(self) -> Iterator[Comparison]:
        """Logits in one pass and in pieces, in a ragged batch, behind real prompts; then hidden states."""
        cases, ends = list(self._cases()), []
        for case in cases:
            past, start = self.graph.empty_past(), 0
            for end in case.splits:
                logits, past = self._run(case.ids[start:end], end, past, self.rows)
                yield Comparison("", logits, reference_logits(self.model, case.ids[:end], self.rows))
                start = end
            ends.append(past)
        yield from self._ragged(cases[:3], ends[:3])
        for prompt in self.prompts:
            yield from self._behind(prompt)
        if names.HIDDEN_STATES in self.graph.outputs:
            yield self._states(cases[1].ids)

    def predictions(self, ids: Ids) -> Iterator[Prediction]:
        """The last tokens of a text one after another, as decoding computes them."""
        count = min(PREDICTIONS, len(ids) - 1)
        wanted = all_logits(self.model, embed(self.model, ids, None, self.vocab))
        past, fed = self.graph.empty_past(), 0
        for at in range(len(ids) - count, len(ids)):
            logits, past = self._run(ids[fed:at], at, past, self.rows)
            yield Prediction(logits, wanted[at - 1], int(ids[at]))
            fed = at

    def greedy(self) -> float:
        """Share of tokens that agree, step by step, both sides following PyTorch's choice."""
        text = self.texts[0][: (self.limit - len(self.rows)) // 2] if self.limit else self.texts[0]
        ids = np.concatenate([self._virtual(len(self.rows)), text])
        past, fed, same = self.graph.empty_past(), 0, 0
        steps = min(GREEDY_STEPS, self.limit - len(ids)) if self.limit else GREEDY_STEPS
        for _ in range(steps):
            logits, past = self._run(ids[fed:], len(ids), past, self.rows)
            fed = len(ids)
            want = reference_logits(self.model, ids, self.rows)
            same += is_tie(logits, want)
            ids = np.append(ids, int(want.argmax()))
        return round(same / steps, 4)

    def _run(
        self, ids: Ids, total: int, past: Mapping[str, npt.NDArray[Any]], rows: Floats
    ) -> tuple[Floats, dict[str, npt.NDArray[Any]]]:
        logits, past = self.graph.run(ids[None], np.ones((1, total), np.int64), past, rows)
        return logits[0], past

    def _virtual(self, count: int) -> Ids:
        return self.vocab + np.arange(count, dtype=np.int64)

    def _cases(self) -> Iterator[_Case]:
        first, second, third = self.texts
        virtual = self._virtual(5)
        yield _Case(first, (len(first),))
        yield _Case(np.concatenate([virtual, second]), (5, 5 + len(second) - 1, 5 + len(second)))
        yield _Case(np.concatenate([third[:2], virtual[::-1], third[2:]]), (3, 5 + len(third)))
        yield _Case(second[:1], (1,))
        if self.window and self.window <= 128 and 2 * self.window + 3 < (self.limit or 1 << 30):
            long = np.resize(np.concatenate([first, virtual, second]), 2 * self.window + 3)
            yield _Case(long, (self.window + 5, len(long) - 1, len(long)))

    def _ragged(self, cases: list[_Case], pasts: list[dict[str, npt.NDArray[Any]]]) -> Iterator[Comparison]:
        """One decode step for rows of different length in one batch, padded on the right."""
        lengths = [len(case.ids) for case in cases]
        longest = max(lengths)
        batch = {
            name: np.concatenate(
                [np.pad(past[name], ((0, 0), (0, 0), (0, longest - past[name].shape[2]), (0, 0))) for past in pasts]
            )
            for name in pasts[0]
        }
        mask = (np.arange(longest + 1)[None] <= np.array(lengths)[:, None]).astype(np.int64)
        following = np.array([case.ids[0] for case in cases], np.int64)
        logits, _ = self.graph.run(following[:, None], mask, batch, self.rows)
        for row, case in enumerate(cases):
            want = reference_logits(self.model, np.append(case.ids, following[row]), self.rows)
            yield Comparison("", logits[row], want)

    def _behind(self, prompt: PromptFile) -> Iterator[Comparison]:
        from transformers import DynamicCache

        for text in self.texts:
            ids, past, cache, length = text, self.graph.empty_past(), None, 0
            rows = np.zeros((1, self.graph.manifest.geometry.hidden_size), np.float32)
            if prompt.prompt_embeddings is not None:
                rows = prompt.prompt_embeddings.astype(np.float32)
                ids = np.concatenate([self._virtual(len(rows)), text])
            elif prompt.past_key_values is not None:
                prefix = prompt.past_key_values.astype(np.float32)
                length = prefix.shape[3]
                cache = DynamicCache()
                for layer, (key, value) in enumerate(prefix):
                    cache.update(torch.from_numpy(key)[None], torch.from_numpy(value)[None], layer)
                    past[names.past(layer, "key")] = key[None].astype(self.graph.kv_dtype)
                    past[names.past(layer, "value")] = value[None].astype(self.graph.kv_dtype)
            if self.limit:
                ids = ids[: self.limit - length]
            logits, _ = self._run(ids, length + len(ids), past, rows)
            yield Comparison(f"prompts.{prompt.name}", logits, reference_logits(self.model, ids, rows, cache))

    def _states(self, ids: Ids) -> Comparison:
        """What heads read, against what PyTorch's output layer reads."""
        taken: list[Floats] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: taken.append(given[0][0].float().numpy().copy())
        )
        try:
            reference_logits(self.model, ids, self.rows)
        finally:
            hook.remove()
        got = self.graph.states(ids, self.rows)
        # Those of the last position alone, where the graph gives no others.
        return Comparison(names.HIDDEN_STATES, got, taken[0][-len(got) :])
