"""Packages for the web in the npm package, and what prompts they serve."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt import EdgePromptError
from edgeprompt.prompts.file import TunedFor, save_prompt
from exporters import export_model, layout
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS

TEXTS = ["The plot is thin.", "a", "Ünïcode ☃"]


@pytest.fixture(scope="module")
def web(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama for the web, in transformers.js' layout and in several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "WEB_FILE", 20_000)
        return export_model(tiny_llama_base, tmp_path_factory.mktemp("web") / "p", target="web", layout="hub").path


def _prompt(package: Path, folder: Path, **fields: Any) -> Any:
    manifest = edgeprompt.load(package, options=QUIET).manifest
    prompt = make_prompt(manifest, "words", verbalizer=WORDS, **fields)
    save_prompt(prompt, folder / "words.safetensors")
    return prompt


def _calls() -> list[dict[str, Any]]:
    return [
        {"method": "classify", "args": [TEXTS, {"prompt": "words"}]},
        {"method": "generate", "args": [TEXTS, {"prompt": "words", "maxNewTokens": 8}]},
    ]


def test_node_answers_as_python(ask: Callable[..., Any], web: Path, tmp_path: Path) -> None:
    prompt = _prompt(web, tmp_path)
    added, classes, generations = ask(
        "serve", package=str(web), calls=[{"prompt": str(tmp_path / "words.safetensors")}, *_calls()]
    )
    assert added.get("value") == "words", added
    with edgeprompt.load(web, options=QUIET) as runtime:
        runtime.add_prompt(prompt)
        for one, other in zip(runtime.classify(TEXTS, prompt="words"), classes["value"], strict=True):
            assert one.label == other["label"]
            assert all(abs(one.logits[name] - other["logits"][name]) < 1e-6 for name in one.logits)
        for text, other in zip(TEXTS, generations["value"], strict=True):
            assert list(runtime.generate(text, prompt="words", max_new_tokens=8).token_ids) == other["tokenIds"]


def test_the_browser_answers_as_python(
    node: str, built: Path, chromium: dict[str, Any], web: Path, tmp_path: Path
) -> None:
    prompt = _prompt(web, tmp_path)
    asked = {
        **chromium, "isolated": False, "calls": _calls(), "prompts": ["words.safetensors"],
        "folders": {"/package/": f"{web}/", "/prompts/": f"{tmp_path}/"},
    }  # fmt: skip
    done = subprocess.run(
        [node, built / "test/browser.mjs"], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    weights = [f"/package/{name}" for name in edgeprompt.load(web, options=QUIET).manifest.graphs["model"].data]
    assert len(weights) > 2
    assert {*weights} <= {*found["firstFetched"]}
    assert not {*weights} & {*found["secondFetched"]}
    with edgeprompt.load(web, options=QUIET) as runtime:
        runtime.add_prompt(prompt)
        expected = runtime.classify(TEXTS, prompt="words")
        for one, other in zip(expected, found["second"]["results"][0], strict=True):
            assert one.label == other["label"]
            # A product of 8-bit integers is exact; what is left is the order of sums in float.
            assert all(abs(one.logits[name] - other["logits"][name]) < 1e-3 for name in one.logits)


@pytest.mark.parametrize(
    ("quality", "tuned", "training"),
    [
        ({"kl_mean": 0.5}, TunedFor("int4", "sha256:x"), {}),
        ({"kl_mean": 0.5}, TunedFor("int8", "sha256:x"), {}),
        ({"kl_mean": 0.5}, TunedFor("fp32"), {}),
        ({"kl_mean": 0.5}, None, {}),
        ({"embedding_distance_worst": 0.2}, (TunedFor("fp32"), TunedFor("int4", "sha256:x")), {}),
        ({"kl_mean": 0.01}, TunedFor("int4", "sha256:x"), {"package_quality": {"kl_mean": 0.4}}),
        ({"kl_mean": 0.01}, TunedFor("int4", "sha256:x"), {"package_quality": {"kl_mean": 0.04}}),
        ({"kl_mean": 0.01}, TunedFor("int4", "sha256:x"), {"package_quality": 3}),
        ({"kl_mean": 0.5, "perplexity_base": 400}, TunedFor("fp32"), {}),
        ({"kl_mean": 0.5}, "these", {}),
        ({}, TunedFor("int4", "sha256:x"), {}),
    ],
)
def test_prompts_for_other_weights(
    ask: Callable[..., Any], web: Path, tmp_path: Path, quality: dict[str, Any], tuned: Any, training: dict[str, Any]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(web, package)
    data = json.loads((package / "edgeprompt.json").read_text("utf-8"))
    (package / "edgeprompt.json").write_text(json.dumps({**data, "quality": quality}), "utf-8")
    with edgeprompt.load(package, options=QUIET) as runtime:
        if tuned == "these":
            tuned = TunedFor("int8", runtime.manifest.weights_hash)
        prompt = replace(_prompt(package, tmp_path), tuned_for=tuned, training=training)
        save_prompt(prompt, tmp_path / "words.safetensors")
        try:
            expected: dict[str, str] = {"value": runtime.add_prompt(prompt)}
        except EdgePromptError as error:
            expected = {"error": type(error).__name__, "message": str(error)}
    file = str(tmp_path / "words.safetensors")
    calls = [{"prompt": file}, {"prompt": file, "options": {"allowOtherWeights": True}}]
    found, allowed = ask("serve", package=str(package), calls=calls)
    assert allowed == {"value": "words"}
    assert {**found, "message": ""} == {**expected, "message": ""}
    if "error" in expected:
        assert found["error"] == "OtherWeightsError"
        reason, _, _ = expected["message"].partition("; tune it")
        assert found["message"].startswith(reason)
        (first, *_) = ask("serve", package=str(package), options={"allowOtherWeights": True}, calls=[{"prompt": file}])
        assert first == {"value": "words"}


def test_prompts_that_the_exporter_let_in(ask: Callable[..., Any], web: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(web, package)
    prompt = replace(_prompt(package, tmp_path), tuned_for=TunedFor("int4", "sha256:x"))
    (package / "prompts").mkdir()
    save_prompt(prompt, package / "prompts/words.safetensors")
    data = json.loads((package / "edgeprompt.json").read_text("utf-8"))
    data |= {"quality": {"kl_mean": 0.5}, "prompts": ["prompts/words.safetensors"]}
    for extra, value in ({"allowed_prompts": [prompt.sha256]}, "words"), ({"allowed_prompts": ["x"]}, None):
        (package / "edgeprompt.json").write_text(json.dumps({**data, "extra": extra}), "utf-8")
        found = ask("serve", package=str(package), calls=[{"method": "prompts"}])
        assert found[0].get("value") == ([value] if value else None)
        assert found[0].get("error") == (None if value else "OtherWeightsError")
