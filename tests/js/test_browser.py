"""The npm package in Chromium: the answers of Python, weights from the cache, damaged ones fetched again."""

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

TEXTS = ["The plot is thin.", "a", "Ünïcode ☃"]


@pytest.mark.parametrize("isolated", [False, True], ids=["one thread", "isolated"])
def test_a_package_in_the_browser(
    node: str, built: Path, chromium: dict[str, Any], tiny_llama_package: Path, tmp_path: Path, isolated: bool
) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for prompt in (
            make_prompt(runtime.manifest, "words", verbalizer=WORDS),
            make_prompt(runtime.manifest, "story"),
        ):
            runtime.add_prompt(prompt)
            save_prompt(prompt, tmp_path / f"{prompt.name}.safetensors")
        classes = [runtime.classify(text, prompt="words") for text in TEXTS]
        generations = [runtime.generate(text, prompt="story", max_new_tokens=8) for text in TEXTS]
    calls = [
        {"method": "classify", "args": [TEXTS, {"prompt": "words"}]},
        {"method": "generate", "args": [TEXTS, {"prompt": "story", "maxNewTokens": 8}]},
    ]
    found = _browse(
        node, built, **chromium, isolated=isolated, calls=calls,
        folders={"/package/": f"{tiny_llama_package}/", "/prompts/": f"{tmp_path}/"},
        prompts=["words.safetensors", "story.safetensors"],
    )  # fmt: skip
    for visit in ("first", "second", "third"):
        said, generated = found[visit]["results"]
        assert found[visit]["isolated"] == isolated
        for one, other in zip(classes, said, strict=True):
            assert one.label == other["label"]
            assert all(abs(one.logits[label] - other["logits"][label]) < 1e-4 for label in one.logits)
        assert [list(one.token_ids) for one in generations] == [one["tokenIds"] for one in generated]
        assert len(found[visit]["pieces"]) > 0
    weights = "/package/model.onnx.data"
    assert weights in found["firstFetched"]
    assert weights not in found["secondFetched"]
    assert weights in found["thirdFetched"]  # the cache held something else under this hash
    assert any(file == "model.onnx.data" and loaded == total for file, loaded, total in found["first"]["progress"])


def _browse(node: str, built: Path, **asked: Any) -> Any:
    done = subprocess.run(
        [node, built / "test/browser.mjs"],
        input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
