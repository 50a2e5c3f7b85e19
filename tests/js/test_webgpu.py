"""Packages for the web on WebGPU, with Chromium's software adapter: an encoder, a decoder, an encoder-decoder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from exporters import export_model
from tests.support.runtimes import QUIET

TEXTS = ["the plot is thin", "a", "Ünïcode ☃ and more words than that", "one two three " * 5]
"""The last has more than 32 tokens: ONNX Runtime has another kernel there."""
SOFTWARE = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


def _ask(node: str, built: Path, chromium: dict[str, Any], package: Path, *calls: list[Any]) -> list[Any]:
    asked = {**chromium, "package": str(package), "calls": calls, "options": {"provider": "webgpu"}, "args": SOFTWARE}
    done = subprocess.run(
        [node, built / "tools/ask.mjs"], input=json.dumps(asked), capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    if "'webgpu' is not available" in done.stderr or "has no adapter in this browser" in done.stderr:
        pytest.skip("this Chromium has no software adapter for WebGPU")
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout)["found"]
    return found


def test_an_encoder(
    node: str, built: Path, chromium: dict[str, Any], encoder_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Texts of several lengths in one batch, so that there is padding."""
    for precision in ("fp32", "int8"):
        package = export_model(encoder_base("BERT"), tmp_path / precision, target="web", precision=precision).path
        (found,) = _ask(node, built, chromium, package, ["embed", TEXTS])
        with edgeprompt.load(package, options=QUIET) as runtime:
            expected = runtime.embed(TEXTS)
        close = 1e-4 if precision == "fp32" else 0.05
        assert np.abs(np.array(found) - expected).max() <= close * np.abs(expected).max()


def test_a_decoder(node: str, built: Path, chromium: dict[str, Any], tiny_llama_base: Path, tmp_path: Path) -> None:
    package = export_model(tiny_llama_base, tmp_path / "p", target="web", precision="fp32").path
    (found,) = _ask(node, built, chromium, package, ["generate", TEXTS, {"maxNewTokens": 6}])
    with edgeprompt.load(package, options=QUIET) as runtime:
        expected = [list(runtime.generate(text, max_new_tokens=6).token_ids) for text in TEXTS]
    assert [one["tokenIds"] for one in found] == expected


@pytest.mark.parametrize("family", ["T5", pytest.param("BART", marks=pytest.mark.slow)])
def test_an_encoder_decoder(
    node: str, built: Path, chromium: dict[str, Any], seq2seq_base: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    package = export_model(seq2seq_base(family), tmp_path / "p", target="web", precision="fp32").path
    (found,) = _ask(node, built, chromium, package, ["generate", TEXTS, {"maxNewTokens": 6}])
    with edgeprompt.load(package, options=QUIET) as runtime:
        expected = [list(runtime.generate(text, max_new_tokens=6).token_ids) for text in TEXTS]
    assert [one["tokenIds"] for one in found] == expected
