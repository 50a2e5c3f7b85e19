"""How much of its base a package keeps: next-token distributions (encoders: embeddings too) over real sentences."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt import names
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import DataError, InputError, UnsupportedError, ValidationError
from edgeprompt.package.files import open_regular
from edgeprompt.package.manifest import Manifest

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

PREDICTIONS = 8
"""Tokens of a text that are predicted one after another."""
AT_ONCE = 64
"""Texts whose logits are in memory at a time."""
MOST_TOKENS = 64
"""Of a text that are read."""
MOST_TEXTS = 256
"""Of the user's data that are read."""
SHIPPED = "shipped text"
UNTRAINED = 0.5
"""Share of the vocabulary: a base with a higher perplexity on real text has learned nothing there that could be lost.
Such a base (random weights, another alphabet) is judged by its weights and by correlations alone."""


@dataclass(frozen=True)
class Limit:
    """Bounds of a figure: `warn` says so in one line, `fail` writes no package. Figures of distance: less is better."""

    key: str
    words: str
    warn: float
    fail: float


LIMITS = (
    Limit("kl_mean", "mean KL divergence", 0.02, 0.1),
    Limit("kl_p90", "90th percentile of the KL divergence", 0.06, 0.25),
    Limit("kl_worst", "KL divergence of the worst text", 0.2, 1.0),
    Limit("embedding_distance_worst", "cosine distance of the worst text's embedding", 0.05, 0.25),
)

LEAST_CORRELATION = 0.7
"""What every comparison of a quantised package, random prompt rows included, must keep with the base; a wrong graph
lands near zero. It counts for bases that have learned nothing too."""
MOST_SPREAD = 1.8
"""How many times as far apart as the base's a comparison's values may lie, or the base's as they: a correlation says
nothing of their scale."""


@dataclass(frozen=True)
class Prediction:
    """What package and base say of one place of a text."""

    got: Floats
    """Logits [vocab_size], or an embedding [hidden_size]."""
    want: Floats
    token: int | None
    """What stands there; None: an embedding of the whole text."""


def measure_quality(
    predictions: Callable[[Ids], Iterator[Prediction]],
    tokenizer: Any | None,
    manifest: Manifest,
    data: Any = None,
    *,
    foresee: Callable[[Sequence[Ids]], None] | None = None,
) -> dict[str, Any]:
    """Figures over texts, in nats; see `LIMITS` for what they may be.

    `foresee` is told which texts `predictions` will be asked for, `AT_ONCE` at a time.

    Returns:
        "texts", "source"; where there are next tokens "kl_mean", "kl_p90", "kl_worst" (mean of the worst text),
        "top1" (share of places with the same most likely token), "perplexity" and "perplexity_base"; where there are
        embeddings "embedding_distance_mean" and "embedding_distance_worst" (1 - cosine, means of all texts taken off).

    Raises:
        DataError: the user's data has no text.
    """
    source, texts = _encoded(tokenizer, manifest, data)
    by_text: list[list[tuple[float, bool, float, float]]] = []
    embeddings: list[tuple[Floats, Floats]] = []
    for at, ids in enumerate(texts):
        if foresee is not None and at % AT_ONCE == 0:
            foresee(texts[at : at + AT_ONCE])
        places = []
        for found in predictions(ids):
            if found.token is None:
                embeddings.append((found.got, found.want))
                continue
            got, want = (torch.log_softmax(torch.from_numpy(v).double(), -1) for v in (found.got, found.want))
            divergence = float((want.exp() * (want - got)).sum())
            places.append(
                (divergence, bool(got.argmax() == want.argmax()), -float(got[found.token]), -float(want[found.token]))
            )
        if places:
            by_text.append(places)
    figures: dict[str, Any] = {"texts": len(texts), "source": source}
    if by_text:
        divergences, same, losses, base_losses = np.array([place for places in by_text for place in places]).T
        figures |= {
            "kl_mean": _figure(max(float(divergences.mean()), 0.0)),
            "kl_p90": _figure(max(float(np.quantile(divergences, 0.9)), 0.0)),
            "kl_worst": _figure(max(max(float(np.mean([p[0] for p in places])) for places in by_text), 0.0)),
            "top1": round(float(same.mean()), 4),
            "perplexity": _figure(float(np.exp(min(losses.mean(), 700)))),
            "perplexity_base": _figure(float(np.exp(min(base_losses.mean(), 700)))),
        }
    if len(embeddings) > 1:
        distances = _distances(*(np.stack(side) for side in zip(*embeddings, strict=True)))
        figures["embedding_distance_mean"] = _figure(float(distances.mean()))
        figures["embedding_distance_worst"] = _figure(float(distances.max()))
    return figures


def with_quality(manifest: Manifest, measured: Mapping[str, Any], *, allow: bool) -> Manifest:
    """The manifest with what `exporters.validate.core.prove` measured, once its quality has passed the gate.

    Raises:
        ValidationError: as `gate`.
    """
    rest = dict(measured)
    quality = rest.pop("quality")
    verdict = gate(quality, manifest, allow=allow)
    return dataclasses.replace(manifest, validation=rest, quality=quality, quality_gate=verdict)


def gate(quality: Mapping[str, Any], manifest: Manifest, *, allow: bool) -> str:
    """ "passed", or "allowed" where a figure is beyond its limit and `allow` is given.

    Raises:
        ValidationError: a figure is beyond its limit; says which, and what to do.
    """
    beyond = [limit for limit in LIMITS if limit.key in quality and not quality[limit.key] <= limit.fail]
    broken = (
        ""
        if is_untrained(quality, manifest) or not beyond
        else (f"{beyond[0].words} is {quality[beyond[0].key]:.3g}, at most {beyond[0].fail:g} is good enough")
    )
    least = quality.get("least_correlation", 1.0)
    if not least >= LEAST_CORRELATION:
        broken = f"one comparison with PyTorch correlates by {least:.3f}, at least {LEAST_CORRELATION} is good enough"
    spread = quality.get("farthest_spread", 1.0)
    if not broken and not 1 / MOST_SPREAD <= spread <= MOST_SPREAD:
        broken = f"values of one comparison lie {spread:.3g} times as far apart as PyTorch's"
    if not broken or allow:
        return "allowed" if broken else "passed"
    smaller = "--precision int8 (--precision gguf for a .gguf file)"
    instead = {"int4": smaller if manifest.extra.get("block_size", 32) == 32 else "--block-size 32"}
    raise ValidationError(
        f"{manifest.precision} loses too much of {manifest.base.name!r}: it {in_words(quality)}; {broken}. "
        f"No package was written: use "
        f"{instead.get(manifest.precision, '--precision fp32')}, or --allow-quality-loss if the task's metric holds"
    )


def warning(quality: Mapping[str, Any], manifest: Manifest) -> str | None:
    """One line where a package that passed is further from its base than most are, else None."""
    far = [limit for limit in LIMITS if limit.key in quality and not quality[limit.key] <= limit.warn]
    if not far or is_untrained(quality, manifest):
        return None
    return f"{manifest.precision} is not close to its base: it {in_words(quality)}; tune prompts --for this package"


def is_untrained(quality: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether the base predicts the text about as badly as chance."""
    return bool(quality.get("perplexity_base", 0) >= UNTRAINED * manifest.geometry.vocab_size)


def in_words(quality: Mapping[str, Any]) -> str:
    """As "keeps 97 of 100 next tokens (mean KL 0.008, perplexity 21.3 beside the base's 21.2)"."""
    if "top1" in quality:
        return (
            f"keeps {100 * quality['top1']:.0f} of 100 next tokens (mean KL {quality['kl_mean']:.3g}, perplexity "
            f"{quality['perplexity']:.4g} beside the base's {quality['perplexity_base']:.4g}, {quality['texts']} texts)"
        )
    if "embedding_distance_worst" in quality:
        kept = 100 * (1 - quality["embedding_distance_worst"])
        return f"keeps {kept:.1f} % of the worst text's embedding ({quality['texts']} texts, by cosine)"
    return f"was judged by its weights alone ({quality['texts']} texts)"


def judging_texts(data: Any = None) -> tuple[str, list[str]]:
    """Where texts come from, and the texts: the user's (a column "text", or the first with text), or the shipped ones.

    Raises:
        DataError: nothing there, or no text in it.
    """
    if data is None:
        return SHIPPED, shipped_texts("judging.txt")
    return read_texts(data)


def calibration_texts(data: Any = None) -> tuple[str, list[str]]:
    """As `judging_texts`, for texts that show which activations matter; the shipped ones are others than those."""
    if data is None:
        return SHIPPED, shipped_texts("calibration.txt")
    return read_texts(data)


def check_calibrated(calibration: Any, loaded: LoadedBase) -> None:
    """Refuse calibration texts that the export of a base would not look at.

    Raises:
        UnsupportedError: there are texts, and the base is no decoder.
    """
    architecture = loaded.family.architecture
    if calibration is not None and architecture != names.DECODER_ONLY:
        raise UnsupportedError(f"{loaded.name!r} is {architecture}, and calibration is for decoders; leave it out")


def check_calibration(calibration: Any, data: Any) -> None:
    """Read the files of texts before the work, and refuse to judge a package by the texts that it is made with.

    Raises:
        InputError: a text is in both.
        DataError: one of them is missing, or has no text.
    """
    from edgeprompt.evaluation.formats import READERS

    given = [
        one
        for one in (calibration, data)
        if isinstance(one, str | os.PathLike)  # else rows in memory
        and (os.path.exists(one) or os.path.splitext(one)[1].lower() in (".txt", *READERS))  # else a dataset's id
    ]
    found = [read_texts(one) for one in given]
    if len(found) < 2:
        return
    (name, texts), (other, judging) = found
    if both := set(texts) & set(judging):
        raise InputError(
            f"{len(both)} texts of calibration {name!r} are in data {other!r} too: a package is judged by other texts "
            "than it is made with, so take them out of one"
        )


def read_texts(data: Any) -> tuple[str, list[str]]:
    """Name and texts of a file: lines of a .txt file, or rows as `tune` reads them.

    Raises:
        DataError: nothing there, or no text in it.
    """
    from edgeprompt.evaluation.data import read_records, source_name

    name = os.path.basename(source_name(data))
    if name.endswith(".txt"):
        try:
            with open_regular(data) as file, io.TextIOWrapper(file, "utf-8-sig") as lines:
                texts = [line.strip() for line in islice(lines, MOST_TEXTS)]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read texts from {name!r}: {reason}") from error
    else:
        texts = [_text_of(row) for row in islice(read_records(data), MOST_TEXTS)]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"data {name!r} holds no text to judge by; give a column 'text', or a .txt file of lines")
    return name, texts


def shipped_texts(name: str) -> list[str]:
    """Lines of a file in `exporters/texts` ("judging.txt", "calibration.txt"), comments left out."""
    lines = (files("exporters") / "texts" / name).read_text("utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines if line and not line.startswith("#")]


def encode_texts(tokenizer: Any | None, texts: list[str], manifest_limit: int, vocab_size: int) -> list[Ids]:
    """Token ids of texts that have at least two and none outside the vocabulary, cut to `MOST_TOKENS`."""
    if tokenizer is None:
        return []
    most = min(MOST_TOKENS, manifest_limit or MOST_TOKENS)
    encoded = (np.array(tokenizer.encode(text)[:most], np.int64) for text in texts)
    return [ids for ids in encoded if len(ids) > 1 and ids.max() < vocab_size]


def _encoded(tokenizer: Any | None, manifest: Manifest, data: Any) -> tuple[str, list[Ids]]:
    size = manifest.geometry
    source, texts = judging_texts(data)
    encoded = encode_texts(tokenizer, texts, size.max_positions, size.vocab_size)
    if encoded:
        return source, encoded
    if data is not None:
        raise DataError(f"{source!r} cannot be read by the base's tokenizer: no text has two tokens it knows")
    random = np.random.default_rng(0)
    return "random token ids", [random.integers(0, size.vocab_size, 24, dtype=np.int64) for _ in range(16)]


def _text_of(row: Mapping[str, Any]) -> str:
    found = row.get("text") or next((value for value in row.values() if isinstance(value, str) and value.strip()), "")
    return found if isinstance(found, str) else ""


def _distances(got: Floats, want: Floats) -> Floats:
    middle = want.mean(0)
    got, want = got - middle, want - middle
    sizes = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    distances: Floats = np.maximum(1 - (got * want).sum(1) / np.maximum(sizes, 1e-12), 0)
    return distances


def _figure(value: float) -> float:
    return float(f"{value:.4g}")
