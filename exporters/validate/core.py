"""What every architecture's proof shares: an architecture gives comparisons and predictions, this judges them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import UnsupportedError, ValidationError
from edgeprompt.package.manifest import Geometry, Manifest
from exporters.validate.quality import Prediction, measure_quality
from exporters.validate.weights import check_weights

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest difference allowed, as a share of the values' largest magnitude. Quantised graphs must correlate
(`exporters.validate.quality.LEAST_CORRELATION`)."""
_LEAST_SCALE = 0.01
"""Of a comparison, as a share of the largest of its output: what lies below is rounding."""
TIE = 1e-4
"""Two tokens nearer to each other than this share of the logits' scale: rounding may decide either way."""

VIRTUAL = 5
"""Virtual rows of the comparisons."""
LEAST_POSITIONS = 12
_TEXTS = (
    "The film starts slowly, but the last half hour is worth the ticket.",
    "Paris is the capital of France, and Berlin is the capital of",
    "She opened the old box and found a letter that said",
)


@dataclass(frozen=True)
class Comparison:
    """One output of the package beside PyTorch's: arrays of one shape, logits or hidden states."""

    what: str
    """The figures' name in the report: "" for the package's main output, or as `prompts.NAME`."""
    got: Floats
    want: Floats


class Subject(Protocol):
    """A package and its base, as an architecture runs them."""

    def comparisons(self) -> Iterator[Comparison]:
        """Outputs over shapes, pieces, ragged batches, virtual rows and real prompts.

        Raises:
            ValidationError: the graph lacks an input or output.
        """
        ...

    def predictions(self, ids: Ids) -> Iterator[Prediction]:
        """What is said of one text."""
        ...


def prove(subject: Subject, loaded: LoadedBase, folder: Path, manifest: Manifest, data: Any = None) -> dict[str, Any]:
    """Judge all comparisons, the stored weights, and the predictions over real text.

    Args:
        subject: What to compare.
        loaded: The base.
        folder: The package.
        manifest: Its manifest.
        data: The user's texts for the predictions (`exporters.validate.quality.judging_texts`); None: shipped text.

    Returns:
        What was measured, with "weights" and "quality".

    Raises:
        ValidationError: a comparison in float, or one stored weight, is further away than the precision allows. What
            quantisation may cost is for `exporters.validate.quality.gate` to judge.
    """
    weights = check_weights(loaded.model, folder, manifest)
    tallies: dict[str, Tally] = {}
    for found in subject.comparisons():
        tallies.setdefault(found.what, Tally()).add(found.got, found.want)
    measured: dict[str, Any] = {}
    for what, tally in tallies.items():
        _judge(what, tally, manifest.precision)
        inner = measured
        for part in what.split(".", 1) if what else ():
            inner = inner.setdefault(part, {})
        inner.update(tally.report())
    if weights:
        measured["weights"] = weights
    measured["quality"] = measure_quality(
        subject.predictions, loaded.tokenizer, manifest, data, foresee=getattr(subject, "foresee", None)
    )
    if manifest.precision not in TOLERANCE:
        every = [one for tally in tallies.values() for one in tally.correlations]
        measured["quality"]["least_correlation"] = round(float(np.min(every)), 4)  # NaN stays
        spreads = [one for tally in tallies.values() for one in tally.spreads]
        farthest = max(spreads, key=lambda one: abs(math.log(one)))
        measured["quality"]["farthest_spread"] = round(farthest, 4)
    return measured


@dataclass
class Tally:
    """Differences collected over the comparisons of one output."""

    differences: list[Floats] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    correlations: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    """How far values lie apart, as a multiple of PyTorch's: what a correlation does not see."""

    def add(self, got: Floats, want: Floats) -> None:
        """Compare one array with PyTorch's.

        Raises:
            ValidationError: they have different shapes.
        """
        if got.shape != want.shape:
            raise ValidationError(f"an output has shape {list(got.shape)}, PyTorch's {list(want.shape)}")
        self.differences.append(np.abs(got - want))
        self.scales.append(float(np.abs(want).max()))
        if want.ndim == 1:
            self.agree.append(is_tie(got, want))
        self.correlations.append(correlation(got, want))
        tiny = 1e-12
        with np.errstate(all="ignore"):  # what is not finite is refused by all other figures
            self.spreads.append((float(got.std()) + tiny) / (float(want.std()) + tiny))

    @property
    def scale(self) -> float:
        """Largest magnitude of PyTorch's values."""
        return float(np.max(self.scales))

    def report(self) -> dict[str, Any]:
        """The figures, rounded."""
        logits = len(self.agree) == len(self.differences)
        return {
            "comparisons": len(self.differences),
            "max_difference": round(float(np.max([d.max() for d in self.differences])), 6),
            "mean_difference": round(float(np.mean([d.mean() for d in self.differences])), 6),
            "logit_scale" if logits else "scale": round(self.scale, 4),
            **({"top1_agreement": round(float(np.mean(self.agree)), 4)} if logits else {}),
            "mean_correlation": round(float(np.mean(self.correlations)), 5),
            "least_correlation": round(float(np.min(self.correlations)), 5),
        }


def correlation(got: Floats, want: Floats) -> float:
    """Pearson's; where one side does not vary (the logits of a token whose embedding is zero): 1 if both do not; NaN
    of what is not finite."""
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("nan")
    spread = got.std() > 0, want.std() > 0
    return float(np.corrcoef(got.ravel(), want.ravel())[0, 1]) if all(spread) else float(not any(spread))


def _judge(what: str, tally: Tally, precision: str) -> None:
    head, _, name = what.partition(".")
    where = f"outputs with prompt {name!r}" if head == "prompts" else what or "logits"
    tolerance = TOLERANCE.get(precision)
    for difference, own in zip(tally.differences, tally.scales, strict=True):
        worst = float(difference.max())
        if not np.isfinite(worst):
            raise ValidationError(f"{precision} {where} hold NaN or infinity")
        # By its own scale: a comparison of small values must not hide behind one of large ones.
        scale = max(own, _LEAST_SCALE * tally.scale)
        if tolerance is not None and not worst <= tolerance * scale:
            raise ValidationError(
                f"{precision} {where} differ from PyTorch's by {worst:.3g}, allowed {tolerance * scale:.3g} "
                f"({tolerance:g} of their scale {scale:.3g})"
            )


def is_tie(got: Floats, want: Floats) -> bool:
    """Whether the package's best token is PyTorch's, or as good as that."""
    return is_best(want, int(got.argmax()))


def is_best(want: Floats, token: int) -> bool:
    """Whether a token is PyTorch's best, or as good as that."""
    return bool(float(want.max()) - float(want[token]) <= TIE * float(np.abs(want).max()))


def sample_ids(loaded: LoadedBase, geometry: Geometry, lengths: Sequence[int] = (15, 13, 11)) -> list[Ids]:
    """Three short texts as token ids; random ids where the base has no tokenizer that fits.

    They leave room for `VIRTUAL` rows and one more token among the base's positions.
    """
    room = max(4, geometry.max_positions - VIRTUAL - 1) if geometry.max_positions else None
    if loaded.tokenizer is not None:
        texts = [np.array(loaded.tokenizer.encode(text), np.int64) for text in _TEXTS]
        if all(len(ids) >= 4 and ids.max() < geometry.vocab_size for ids in texts):
            return [ids[:room] for ids in texts]
    generator = np.random.default_rng(0)
    return [generator.integers(0, geometry.vocab_size, length, dtype=np.int64)[:room] for length in lengths]


def check_positions(geometry: Geometry, name: str) -> None:
    """Refuse a base that is too short to be checked.

    Raises:
        UnsupportedError: it has fewer positions than `LEAST_POSITIONS`.
    """
    if 0 < geometry.max_positions < LEAST_POSITIONS:
        raise UnsupportedError(
            f"{name!r} has {geometry.max_positions} positions, and {LEAST_POSITIONS} is the least: a prompt, a text "
            "and an answer need more"
        )


def random_rows(model: Any, count: int = VIRTUAL) -> Floats:
    """Rows as an untrained prompt has them: of the size of what the embedding module returns."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sample = model.get_input_embeddings()(torch.arange(64))
    noise: Floats = (torch.randn((count, sample.shape[-1]), generator=generator) * sample.std()).numpy()
    return noise
