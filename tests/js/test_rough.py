"""The npm package in a page whose network, disk or context misbehaves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt.prompts.file import save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS


@pytest.fixture(scope="module")
def found(
    node: str, built: Path, chromium: dict[str, Any], tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What came of every case of `js/test/rough.mjs`."""
    file = tmp_path_factory.mktemp("prompts") / "words.safetensors"
    save_prompt(
        make_prompt(edgeprompt.load(tiny_llama_package, options=QUIET).manifest, "words", verbalizer=WORDS), file
    )
    done = subprocess.run(
        [node, built / "test/rough.mjs"],
        input=json.dumps({**chromium, "package": str(tiny_llama_package), "prompt": str(file)}),
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.fixture(scope="module")
def label(tiny_llama_package: Path) -> str:
    """Python's answer."""
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "words", verbalizer=WORDS))
        return runtime.classify("The plot is thin.", prompt="words").label


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("no package", "PackageError", "edgeprompt export makes one"),
        ("a page in its place", "PackageError", "edgeprompt.json"),
        ("insecure", "UnsupportedError", "https"),
        ("aborted while it downloads", "RequestCancelledError", "loading was cancelled"),
        ("a connection that breaks", "PackageError", "model.onnx.data"),
    ],
)
def test_errors(found: dict[str, Any], case: str, kind: str, words: str) -> None:
    assert found[case].get("error") == kind, found[case]
    assert words in found[case]["message"]
    assert "\n" not in found[case]["message"]


@pytest.mark.parametrize(
    ("case", "fetches"),
    [("reloaded", 1), ("then from the cache", 0), ("no room", 1), ("still no room", 1), ("cache none", 1)],
)
def test_weights_are_fetched_once_where_they_can_be_kept(
    found: dict[str, Any], label: str, case: str, fetches: int
) -> None:
    assert found[case] == {"labels": [label], "weights": fetches}


@pytest.mark.parametrize(("case", "count"), [("two at once", 2), ("two tabs", 2), ("threads without isolation", 1)])
def test_side_by_side(found: dict[str, Any], label: str, case: str, count: int) -> None:
    assert found[case]["labels"] == [label] * count
