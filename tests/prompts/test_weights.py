"""Prompts tuned for other weights than a package has: served where both are near the base, else refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import BaseMismatchError, OtherWeightsError, save_prompt
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import TunedFor
from edgeprompt.prompts.weights import ALLOWED, TUNED_QUALITY, check_weights, figures
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

FAR, NEAR = {"kl_mean": 0.5, "perplexity_base": 20.0}, {"kl_mean": 0.01, "perplexity_base": 20.0}
ELSEWHERE = TunedFor("int4", "sha256:00")


@pytest.fixture
def far(tiny_llama_package: Path, tmp_path: Path) -> Path:
    """The tiny package, its manifest saying that it is far from its base."""
    folder = tmp_path / "far"
    shutil.copytree(tiny_llama_package, folder)
    manifest = json.loads((folder / "edgeprompt.json").read_text())
    manifest |= {"quality": FAR, "precision": "int4", "quality_gate": "allowed"}
    (folder / "edgeprompt.json").write_text(json.dumps(manifest))
    return folder


def test_a_far_package_serves_what_was_tuned_for_it_and_refuses_others(far: Path, tmp_path: Path) -> None:
    with edgeprompt.load(far, options=QUIET) as runtime:
        mine = TunedFor("int4", runtime.manifest.weights_hash)
        assert runtime.add_prompt(make_prompt(runtime.manifest, "mine", tuned_for=mine)) == "mine"
        for method, tuned in (("prompt-tuning", ELSEWHERE), ("prefix-tuning", TunedFor("fp32")), ("p-tuning", None)):
            other = make_prompt(runtime.manifest, "other", method, tuned_for=tuned)
            with pytest.raises(OtherWeightsError, match=r"0\.5.*edgeprompt tune .* --for .*far.*--allow-other-weights"):
                runtime.add_prompt(other)
            assert "other" not in runtime.prompts
            runtime.add_prompt(other, allow_other_weights=True)
            runtime.remove_prompt("other")
        text = dataclasses.replace(make_prompt(runtime.manifest, "text"), prompt_embeddings=None)
        text = dataclasses.replace(text, template=type(text.template).parse("{text}"))
        runtime.add_prompt(text)  # nothing was tuned
        save_prompt(make_prompt(runtime.manifest, "filed", tuned_for=ELSEWHERE), tmp_path / "filed.safetensors")
        runtime.add_folder(tmp_path)
        with pytest.raises(OtherWeightsError):
            runtime.logits("a", prompt="filed")
    options = dataclasses.replace(QUIET, allow_other_weights=True)
    with edgeprompt.load(far, options=options) as runtime:
        runtime.add_folder(tmp_path)
        assert runtime.logits("a", prompt="filed").size
    assert issubclass(OtherWeightsError, BaseMismatchError)


def test_the_rule(tiny_llama_package: Path) -> None:
    exact = Manifest.from_json((tiny_llama_package / "edgeprompt.json").read_text())

    def passes(
        quality: dict[str, Any], *, precision: str = "int4", extra: dict[str, Any] | None = None, **fields: Any
    ) -> bool:
        manifest = dataclasses.replace(exact, precision=precision, quality=quality, extra=extra or {})
        prompt = make_prompt(manifest, "p", **fields)
        try:
            check_weights(prompt, manifest, sha256="a")
        except OtherWeightsError:
            return False
        return True

    assert passes(NEAR, tuned_for=ELSEWHERE)
    assert not passes(FAR, tuned_for=ELSEWHERE)
    assert passes({**FAR, "perplexity_base": 500.0}, tuned_for=ELSEWHERE)  # random weights: nothing to lose
    assert not passes({"embedding_distance_worst": 0.2}, tuned_for=ELSEWHERE)
    assert not passes({"kl_mean": float("nan")}, tuned_for=ELSEWHERE)
    assert passes({}, tuned_for=ELSEWHERE)  # not judged
    assert passes(FAR, precision="fp32")  # a file that names no weights counts as tuned in float
    # Near this package, and tuned for one that is far.
    assert not passes(NEAR, tuned_for=ELSEWHERE, training={TUNED_QUALITY: figures(FAR)})
    assert passes(NEAR, tuned_for=ELSEWHERE, training={TUNED_QUALITY: figures(NEAR)})
    assert passes(FAR, tuned_for=ELSEWHERE, extra={ALLOWED: ["a"]})
    assert not passes(FAR, tuned_for=ELSEWHERE, extra={ALLOWED: ["b"]})
    head = {"head": {"classifier.weight": np.zeros((2, 64), np.float32)}}
    assert not passes(FAR, tuned_for=None, **head)
