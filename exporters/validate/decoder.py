"""Proves a decoder package: the graph in ONNX Runtime against the base in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from edgeprompt import names
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import ValidationError
from edgeprompt.ort.session import graph_inputs
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile

Floats = npt.NDArray[np.float32]

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest difference allowed, as a share of the logits' largest magnitude. Quantised graphs are reported."""
LEAST_CORRELATION = 0.7
"""What a quantised graph's logits must keep with the base's, on average: a wrong graph lands near zero."""
GREEDY_STEPS = 12

_TEXTS = (
    "The film starts slowly, but the last half hour is worth the ticket.",
    "Paris is the capital of France, and Berlin is the capital of",
    "She opened the old box and found a letter that said",
)


@dataclass(frozen=True)
class _Case:
    """One sequence: virtual rows and token ids in one row of ids, fed in pieces that end at `splits`."""

    ids: npt.NDArray[np.int64]
    splits: tuple[int, ...]


@dataclass
class _Tally:
    """Differences collected over cases."""

    differences: list[Floats] = field(default_factory=list)
    scale: float = 0.0
    agree: list[bool] = field(default_factory=list)
    correlations: list[float] = field(default_factory=list)

    def add(self, got: Floats, want: Floats) -> None:
        self.differences.append(np.abs(got - want))
        self.scale = max(self.scale, float(np.abs(want).max()))
        self.agree.append(bool(got.argmax() == want.argmax()))
        self.correlations.append(float(np.corrcoef(got.ravel(), want.ravel())[0, 1]))

    def report(self) -> dict[str, Any]:
        return {
            "comparisons": len(self.agree),
            "max_difference": round(max(float(d.max()) for d in self.differences), 6),
            "mean_difference": round(float(np.mean([d.mean() for d in self.differences])), 6),
            "logit_scale": round(self.scale, 4),
            "top1_agreement": round(float(np.mean(self.agree)), 4),
            "mean_correlation": round(float(np.mean(self.correlations)), 5),
        }


class DecoderGraph:
    """A decoder package's graph, run as plainly as possible: one call, one piece of a sequence."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Between PyTorch's turns the graph's threads would spin for nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = "CUDAExecutionProvider" if "CUDAExecutionProvider" in ort.get_available_providers() else None
        providers = [provider, "CPUExecutionProvider"] if provider else ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(folder / manifest.graphs["model"].file, options, providers=providers)
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
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))


def validate_decoder(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...]
) -> dict[str, Any]:
    """Compare over several shapes, ragged batches and greedy tokens, with virtual rows and with real prompts.

    Raises:
        ValidationError: names, shapes, values or tokens differ by more than the precision allows.
    """
    graph = DecoderGraph(folder, manifest)
    rows = _prompt_rows(loaded.model)
    tally = _Tally()
    cases = list(_cases(loaded, manifest))
    ends = [_compare(loaded.model, graph, case, rows, tally) for case in cases]
    _compare_ragged(loaded.model, graph, cases[:3], ends[:3], rows, tally)
    measured: dict[str, Any] = tally.report()
    measured["greedy_agreement"] = _greedy(loaded, graph, rows, _text_ids(loaded, manifest)[0])
    measured["prompts"] = {prompt.name: _prompt_report(loaded, graph, prompt) for prompt in prompts}
    _judge(measured, manifest.precision)
    if names.HIDDEN_STATES in graph.outputs:
        measured[names.HIDDEN_STATES] = _compare_states(loaded.model, graph, cases[1], rows, manifest.precision)
    return measured


def reference_logits(model: Any, ids: npt.NDArray[np.int64], rows: Floats, past: Any = None) -> Floats:
    """PyTorch's logits behind one row of ids (virtual ones included), [vocab_size]; `past` is a transformers cache."""
    with torch.no_grad():
        output = model(inputs_embeds=_embed(model, ids, rows), past_key_values=past, use_cache=past is not None)
    vocab = model.config.get_text_config().vocab_size
    logits: Floats = output.logits[0, -1, :vocab].float().numpy()
    return logits


def _embed(model: Any, ids: npt.NDArray[np.int64], rows: Floats) -> torch.Tensor:
    vocab = model.config.get_text_config().vocab_size
    index = torch.from_numpy(ids)
    virtual = index >= vocab
    embedded = model.get_input_embeddings()(torch.where(virtual, 0, index))
    table = torch.from_numpy(rows)[torch.where(virtual, index - vocab, 0)]
    joined: torch.Tensor = torch.where(virtual[..., None], table, embedded)[None]
    return joined


def _prompt_rows(model: Any, count: int = 5) -> Floats:
    """Rows as an untrained prompt has them: of the size of what the embedding module returns."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sample = model.get_input_embeddings()(torch.arange(64))
    noise: Floats = (torch.randn((count, sample.shape[-1]), generator=generator) * sample.std()).numpy()
    return noise


def _text_ids(loaded: LoadedBase, manifest: Manifest) -> list[npt.NDArray[np.int64]]:
    vocab = manifest.geometry.vocab_size
    if loaded.tokenizer is not None:
        texts = [np.array(loaded.tokenizer.encode(text), np.int64) for text in _TEXTS]
        if all(len(ids) >= 4 and ids.max() < vocab for ids in texts):
            return texts
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab, length, dtype=np.int64) for length in (15, 13, 11)]


def _cases(loaded: LoadedBase, manifest: Manifest) -> Iterator[_Case]:
    vocab = manifest.geometry.vocab_size
    first, second, third = _text_ids(loaded, manifest)
    virtual = vocab + np.arange(5, dtype=np.int64)
    yield _Case(first, (len(first),))
    yield _Case(np.concatenate([virtual, second]), (5, 5 + len(second) - 1, 5 + len(second)))
    yield _Case(np.concatenate([third[:2], virtual[::-1], third[2:]]), (3, 5 + len(third)))
    yield _Case(second[:1], (1,))
    window = getattr(loaded.config.get_text_config(), "sliding_window", None)
    if window and window <= 128:
        long = np.resize(np.concatenate([first, virtual, second]), 2 * window + 3)
        yield _Case(long, (window + 5, len(long) - 1, len(long)))


def _compare(model: Any, graph: DecoderGraph, case: _Case, rows: Floats, tally: _Tally) -> dict[str, npt.NDArray[Any]]:
    past, start = graph.empty_past(), 0
    for end in case.splits:
        logits, past = graph.run(case.ids[None, start:end], np.ones((1, end), np.int64), past, rows)
        tally.add(logits[0], reference_logits(model, case.ids[:end], rows))
        start = end
    return past


def _compare_ragged(
    model: Any,
    graph: DecoderGraph,
    cases: list[_Case],
    pasts: list[dict[str, npt.NDArray[Any]]],
    rows: Floats,
    tally: _Tally,
) -> None:
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
    logits, _ = graph.run(following[:, None], mask, batch, rows)
    for row, case in enumerate(cases):
        tally.add(logits[row], reference_logits(model, np.append(case.ids, following[row]), rows))


def _compare_states(model: Any, graph: DecoderGraph, case: _Case, rows: Floats, precision: str) -> dict[str, float]:
    """What heads read, against what PyTorch's output layer reads; quantised graphs are judged by their logits alone."""
    taken: list[Floats] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: taken.append(given[0][0].float().numpy().copy())
    )
    try:
        reference_logits(model, case.ids, rows)
    finally:
        hook.remove()
    got = graph.states(case.ids, rows)
    want = taken[0][-len(got) :]  # those of the last position alone, where the graph gives no others
    worst, scale = float(np.abs(got - want).max()), float(np.abs(want).max())
    tolerance = TOLERANCE.get(precision)
    if tolerance is not None and not worst <= tolerance * scale:
        raise ValidationError(
            f"{precision} {names.HIDDEN_STATES} differ from what PyTorch's output layer reads by {worst:.3g} of "
            f"{scale:.3g}; no package was written"
        )
    correlation = float(np.corrcoef(got.ravel(), want.ravel())[0, 1])
    return {"max_difference": round(worst, 6), "scale": round(scale, 4), "correlation": round(correlation, 5)}


def _greedy(loaded: LoadedBase, graph: DecoderGraph, rows: Floats, start: npt.NDArray[np.int64]) -> float:
    """Share of tokens that agree, step by step, both sides following PyTorch's choice."""
    vocab = graph.manifest.geometry.vocab_size
    ids = np.concatenate([vocab + np.arange(len(rows), dtype=np.int64), start])
    past, fed, same = graph.empty_past(), 0, 0
    for _ in range(GREEDY_STEPS):
        logits, past = graph.run(ids[None, fed:], np.ones((1, len(ids)), np.int64), past, rows)
        fed = len(ids)
        want = reference_logits(loaded.model, ids, rows)
        # Two tokens within the tolerance of each other are a tie that rounding may decide either way.
        best = int(want.argmax())
        tie = want[best] - want[int(logits[0].argmax())] <= 1e-4 * float(np.abs(want).max())
        same += int(logits[0].argmax() == best or tie)
        ids = np.append(ids, best)
    return round(same / GREEDY_STEPS, 4)


def _prompt_report(loaded: LoadedBase, graph: DecoderGraph, prompt: PromptFile) -> dict[str, Any]:
    """The same comparison behind a real prompt."""
    from transformers import DynamicCache

    tally = _Tally()
    vocab = graph.manifest.geometry.vocab_size
    for text in _text_ids(loaded, graph.manifest):
        rows, ids, past, cache, length = np.zeros((1, 1), np.float32), text, graph.empty_past(), None, 0
        rows = np.zeros((1, graph.manifest.geometry.hidden_size), np.float32)
        if prompt.prompt_embeddings is not None:
            rows = prompt.prompt_embeddings.astype(np.float32)
            ids = np.concatenate([vocab + np.arange(len(rows), dtype=np.int64), text])
        elif prompt.past_key_values is not None:
            prefix = prompt.past_key_values.astype(np.float32)
            length = prefix.shape[3]
            cache = DynamicCache()
            for layer, (key, value) in enumerate(prefix):
                cache.update(torch.from_numpy(key)[None], torch.from_numpy(value)[None], layer)
                past[names.past(layer, "key")] = key[None].astype(graph.kv_dtype)
                past[names.past(layer, "value")] = value[None].astype(graph.kv_dtype)
        logits, _ = graph.run(ids[None], np.ones((1, length + len(ids)), np.int64), past, rows)
        tally.add(logits[0], reference_logits(loaded.model, ids, rows, cache))
    return tally.report()


def _judge(measured: Mapping[str, Any], precision: str) -> None:
    tolerance = TOLERANCE.get(precision)
    reports = {"the base": measured, **{f"prompt {name!r}": found for name, found in measured["prompts"].items()}}
    for what, found in reports.items():
        if tolerance is not None:
            allowed = tolerance * found["logit_scale"]
            if not found["max_difference"] <= allowed:
                raise ValidationError(
                    f"{precision} logits of {what} differ from PyTorch's by {found['max_difference']:.3g}, allowed "
                    f"{allowed:.3g} ({tolerance:g} of their scale {found['logit_scale']:.3g}); no package was written"
                )
        elif not found["mean_correlation"] >= LEAST_CORRELATION:
            raise ValidationError(
                f"{precision} logits of {what} correlate with PyTorch's by {found['mean_correlation']:.3f}, at least "
                f"{LEAST_CORRELATION} is needed; no package was written: try another precision or --route"
            )
    if precision == "fp32" and measured["greedy_agreement"] < 1:
        raise ValidationError(
            f"fp32 greedy tokens agree with PyTorch's in {measured['greedy_agreement']:.0%} of {GREEDY_STEPS} steps, "
            "all must; no package was written"
        )
