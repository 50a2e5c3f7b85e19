"""What a JavaScript program can give that is wrong ends in one clear line, and leaves nothing that keeps it alive."""

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

OTHERS = {
    "load nowhere": "PackageError",
    "load https://example.org/model/": "PackageError",
    "load /edgeprompt.json": "PackageError",
    "load with provider unknown": "ProviderError",
    "load aborted": "RequestCancelledError",
    "load aborted soon, in a worker": "RequestCancelledError",
    "load aborted soon, here": "RequestCancelledError",
    "classify with prompt __proto__": "PromptNotFoundError",
    "addPrompt URL": "PromptFileError",
    "addPrompt folder": "PromptFileError",
    "addPrompt manifest": "PromptFileError",
    "addPrompt weights": "PromptFileError",
    "addPrompt no bytes": "PromptFileError",
    "onResult that throws": "Error",
    "after that": "RequestCancelledError",
}
"""Errors of another kind than InputError."""
VALUES: dict[str, Any] = {
    "stop null": 2,
    "prompts": ["words", "story"],
    "bytes of a prompt": "bytes",
    "one of two aborted": ["RequestCancelledError", 9],
    "a stream that is left": 2,
    "two runtimes": [True, True],
    "disposed": "RequestCancelledError",
    "a hundred at once": 100,
    "closed while busy": "RequestCancelledError",
}


@pytest.fixture(scope="module")
def found(node: str, built: Path, tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every case of `js/test/misuse.mjs`."""
    folder = tmp_path_factory.mktemp("prompts")
    manifest = edgeprompt.load(tiny_llama_package, options=QUIET).manifest
    prompts = {
        "words": make_prompt(manifest, "words", verbalizer=WORDS),
        "story": make_prompt(manifest, "story", seed=1),
    }
    for name, prompt in prompts.items():
        save_prompt(prompt, folder / f"{name}.safetensors")
    asked = {"package": str(tiny_llama_package), **{name: str(folder / f"{name}.safetensors") for name in prompts}}
    done = subprocess.run(
        [node, built / "test/misuse.mjs"], input=json.dumps(asked), capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_what_is_wrong_is_an_error_of_its_kind(found: dict[str, Any]) -> None:
    errors = {name: one for name, one in found.items() if "error" in one}
    assert len(errors) > 60
    wrong = {
        name: one for name, one in errors.items()
        if one["error"] != OTHERS.get(name, "InputError")
        or "\n" in one["message"] or not one["message"]
    }  # fmt: skip
    assert not wrong
    assert {*OTHERS} <= {*errors}


def test_what_is_right_has_its_answer(found: dict[str, Any]) -> None:
    values = {name: one["value"] for name, one in found.items() if "value" in one}
    assert {name: values.get(name) for name in VALUES} == VALUES
    odd = [value for name, value in values.items() if name.startswith("odd text ")]
    assert len(odd) == 9
    assert {*odd} <= {*WORDS}
    assert values["a long text, cut"] > 100
    assert {*values} == {*VALUES, "a long text, cut", *(name for name in found if name.startswith("odd text "))}
