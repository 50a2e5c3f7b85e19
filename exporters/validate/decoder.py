"""Proves a decoder package: the graph in ONNX Runtime against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.base.decoder_graph import DecoderGraph
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import ValidationError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.validate.core import Comparison, Floats, Ids, is_best, prove, random_rows, sample_ids
from exporters.validate.quality import PREDICTIONS, Prediction
from exporters.validate.reference import Question, ask

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
        raise ValidationError(f"fp32 greedy tokens agree with PyTorch's in {agreement:.0%} of the steps, all must")
    return measured


class _Decoder:
    def __init__(self, loaded: LoadedBase, graph: DecoderGraph, prompts: tuple[PromptFile, ...]) -> None:
        self.model, self.graph, self.prompts = loaded.model, graph, prompts
        self.vocab = graph.manifest.geometry.vocab_size
        self.limit = graph.manifest.geometry.max_positions
        self.texts = sample_ids(loaded, graph.manifest.geometry)
        self.rows = random_rows(loaded.model)
        self.window = getattr(loaded.config.get_text_config(), "sliding_window", None)
        self._foreseen: dict[bytes, Floats] = {}
        self._greedy = 0.0

    def comparisons(self) -> Iterator[Comparison]:
        """Logits in one pass and in pieces, in a ragged batch, behind real prompts; then hidden states.

        The package runs first. What PyTorch is asked by then is asked at once (`exporters.validate.reference`).
        """
        cases, got = list(self._cases()), []
        questions = []
        ends = []
        for case in cases:
            past, start = self.graph.empty_past(), 0
            for end in case.splits:
                logits, past = self._run(case.ids[start:end], end, past, self.rows)
                got.append(logits)
                questions.append(Question(case.ids[:end], [end - 1], self.rows))
                start = end
            ends.append(past)
        for ids, logits in self._ragged(cases[:3], ends[:3]):
            got.append(logits)
            questions.append(Question(ids, [len(ids) - 1], self.rows))
        states = cases[1].ids
        path, steps = self._greedy_path()
        said = ask(
            self.model,
            [
                *questions,
                Question(path, range(len(path) - 1 - steps, len(path) - 1), self.rows),
                Question(states, range(len(states)), self.rows),
            ],
            self.vocab,
        )
        for logits, wanted in zip(got, said, strict=False):
            yield Comparison("", logits, wanted.logits[0])
        chosen = path[-steps:]
        same = [is_best(wanted, int(token)) for wanted, token in zip(said[-2].logits, chosen, strict=True)]
        self._greedy = round(sum(same) / steps, 4)
        for prompt in self.prompts:
            yield from self._behind(prompt)
        if names.HIDDEN_STATES in self.graph.outputs:
            found = self.graph.states(states, self.rows)
            # Those of the last position alone, where the graph gives no others.
            yield Comparison(names.HIDDEN_STATES, found, said[-1].states[-len(found) :])

    def foresee(self, texts: Sequence[Ids]) -> None:
        """Ask PyTorch about all of these texts, which `predictions` will be asked for."""
        questions = [Question(ids, range(len(ids) - _count(ids) - 1, len(ids) - 1)) for ids in texts]
        self._foreseen = {
            ids.tobytes(): said.logits for ids, said in zip(texts, ask(self.model, questions, self.vocab), strict=True)
        }

    def predictions(self, ids: Ids) -> Iterator[Prediction]:
        """The last tokens of a text one after another, as decoding computes them."""
        if ids.tobytes() not in self._foreseen:
            self.foresee([ids])
        past, fed = self.graph.empty_past(), 0
        for at, wanted in zip(range(len(ids) - _count(ids), len(ids)), self._foreseen[ids.tobytes()], strict=True):
            logits, past = self._run(ids[fed:at], at, past, self.rows)
            yield Prediction(logits, wanted, int(ids[at]))
            fed = at

    def greedy(self) -> float:
        """Share of the package's greedy tokens that PyTorch, behind the same tokens, would have chosen."""
        return self._greedy

    def _greedy_path(self) -> tuple[Ids, int]:
        """Virtual rows, a text, and what the package says behind them; and how many tokens it says."""
        text = self.texts[0][: (self.limit - len(self.rows)) // 2] if self.limit else self.texts[0]
        ids = np.concatenate([self._virtual(len(self.rows)), text])
        steps = min(GREEDY_STEPS, self.limit - len(ids)) if self.limit else GREEDY_STEPS
        past, fed = self.graph.empty_past(), 0
        for _ in range(steps):
            logits, past = self._run(ids[fed:], len(ids), past, self.rows)
            fed = len(ids)
            ids = np.append(ids, int(logits[: self.vocab].argmax()))
        return ids, steps

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

    def _ragged(self, cases: list[_Case], pasts: list[dict[str, npt.NDArray[Any]]]) -> Iterator[tuple[Ids, Floats]]:
        """One decode step for rows of different length in one batch, padded on the right: ids, and their logits."""
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
            yield np.append(case.ids, following[row]), logits[row]

    def _behind(self, prompt: PromptFile) -> Iterator[Comparison]:
        prefix = prompt.past_key_values
        rows = np.zeros((1, self.graph.manifest.geometry.hidden_size), np.float32)
        texts, length = list(self.texts), 0
        if prompt.prompt_embeddings is not None:
            rows = prompt.prompt_embeddings.astype(np.float32)
            texts = [np.concatenate([self._virtual(len(rows)), text]) for text in texts]
        elif prefix is not None:
            prefix, length = prefix.astype(np.float32), prefix.shape[3]
        if self.limit:
            texts = [ids[: self.limit - length] for ids in texts]
        said = ask(self.model, [Question(ids, [len(ids) - 1], rows) for ids in texts], self.vocab, prefix)
        for ids, wanted in zip(texts, said, strict=True):
            past = self.graph.empty_past()
            for layer, (key, value) in enumerate(prefix if prefix is not None else ()):
                past[names.past(layer, "key")] = key[None].astype(self.graph.kv_dtype)
                past[names.past(layer, "value")] = value[None].astype(self.graph.kv_dtype)
            logits, _ = self._run(ids, length + len(ids), past, rows)
            yield Comparison(f"prompts.{prompt.name}", logits, wanted.logits[0])


def _count(ids: Ids) -> int:
    """How many of a text's last tokens are predicted."""
    return min(PREDICTIONS, len(ids) - 1)
