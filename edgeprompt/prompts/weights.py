"""Whether a prompt may be served on a package's weights: those it was tuned for, or such as are near their base.

A soft prompt follows the weights that it was tuned on. Two packages that are both near their base hold nearly the same
weights; where one of them is far, a prompt of the other may answer worse than no prompt, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprompt.errors import OtherWeightsError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile, TunedFor

ALLOWED = "allowed_prompts"
"""Key of the manifest's `extra`: hashes of prompt files that the exporter put into the package whatever they were tuned
for."""
TUNED_QUALITY = "package_quality"
"""Key of a prompt's `training`: the figures of `NEAR` of the package that it was tuned for."""
_EXACT = ("fp32", "fp16")


@dataclass(frozen=True)
class _Bound:
    key: str
    words: str
    most: float


NEAR = (
    _Bound("kl_mean", "mean KL divergence", 0.05),
    _Bound("embedding_distance_worst", "worst distance of an embedding", 0.05),
)
"""Figures of a manifest's `quality`, and up to where a package counts as near its base: between the limits that an
export warns at and fails at. SmolLM2 at 4 bits in blocks of 128 has 0.566, and a prompt tuned for blocks of 32 is there
worse than none."""
_UNTRAINED = 0.5
"""Share of the vocabulary: a base with a higher perplexity has learned nothing that a figure could compare."""


def figures(quality: Mapping[str, Any]) -> dict[str, float]:
    """What of a package's quality a prompt that is tuned for it notes."""
    return {bound.key: float(quality[bound.key]) for bound in NEAR if bound.key in quality}


def nearest(qualities: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the nearest of several packages: a prompt that was tuned for all follows that one too."""
    return min(map(figures, qualities), key=lambda one: max(one.values(), default=0.0), default={})


def differ(prompt: PromptFile, manifest: Manifest) -> str | None:
    """What a prompt was tuned for, in words, where that is not this package; None where it is, or where nothing is."""
    tensors = (prompt.prompt_embeddings, prompt.past_key_values, prompt.encoder_past_key_values)
    tuned = prompt.tuned_weights
    if not tuned:
        if all(tensor is None for tensor in tensors) and not prompt.head:
            return None  # text alone
        # Other tools tune in float and note nothing.
        return None if manifest.precision in _EXACT else "weights that its file does not name"
    found = [_other(one, manifest) for one in tuned]
    return None if None in found else " and ".join(dict.fromkeys(str(other) for other in found))


def _other(tuned: TunedFor, manifest: Manifest) -> str | None:
    """What one of the weights that a prompt was tuned for is called, where it is not this package."""
    if tuned.weights_hash is None:
        return None if tuned.precision == manifest.precision else tuned.precision
    if tuned.weights_hash == manifest.weights_hash:
        return None
    same = tuned.precision == manifest.precision
    return f"another {tuned.precision} package" if same else f"{tuned.precision}"


def check_weights(
    prompt: PromptFile, manifest: Manifest, *, sha256: str | None = None, package: str = "PACKAGE"
) -> None:
    """Refuse a prompt that was tuned for other weights, where they or the package's are far from the base.

    Args:
        prompt: With its tensors.
        manifest: The package's.
        sha256: Of the prompt's file.
        package: What to call the package in the command that helps.

    Raises:
        OtherWeightsError: says how far, and the command that tunes the prompt.
    """
    other = differ(prompt, manifest)
    if other is None or (sha256 is not None and sha256 in manifest.extra.get(ALLOWED, ())):
        return
    far = _far(manifest.quality, manifest.geometry.vocab_size)
    whose = "this package is"
    if far is None:
        tuned = prompt.training.get(TUNED_QUALITY)
        far = _far(tuned, manifest.geometry.vocab_size) if isinstance(tuned, Mapping) else None
        whose = "that one is"
    if far is not None:
        raise OtherWeightsError(
            f"prompt {prompt.name!r} was tuned for {other}, and {whose} far from its base ({far}), so it may answer "
            f"worse than no prompt; tune it for this package: edgeprompt tune {manifest.base.name} DATA --for "
            f"{package} -o {prompt.name}.safetensors; --allow-other-weights serves it all the same"
        )


def _far(quality: Mapping[str, Any], vocab_size: int) -> str | None:
    if quality.get("perplexity_base", 0) >= _UNTRAINED * vocab_size:
        return None
    for bound in NEAR:
        value = quality.get(bound.key)
        if isinstance(value, int | float) and not value <= bound.most:
            return f"{bound.words} {value:.3g}, near is at most {bound.most:g}"
    return None
