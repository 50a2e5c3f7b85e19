"""A prompt as keys and values: equal to the prompt itself, and taken by unmodified transformers.js."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import edgeprompt
from edgeprompt.errors import BaseMismatchError, InputError, UnsupportedError
from edgeprompt.prompts.file import PromptFile, save_prompt
from edgeprompt.prompts.template import Template
from exporters import export_model
from exporters.convert import convert_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

TEXTS = ("the plot is thin", "a", "one two three", "who is it?", "Ünïcode")


def _as_prefix(prompt: PromptFile, file: Path) -> PromptFile:
    tensors = load_file(file)
    layers = len(tensors) // 2
    past = np.stack(
        [
            np.stack([tensors[f"past_key_values.{layer}.{part}"][0] for part in ("key", "value")])
            for layer in range(layers)
        ]
    )
    return dataclasses.replace(
        prompt,
        name="kv",
        method="prefix-tuning",
        prompt_embeddings=None,
        past_key_values=past,
        template=prompt.template.without_prompt(),
    )


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_the_prefix_is_the_prompt(tiny_llama_package: Path, tmp_path: Path, method: str) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        prompt = make_prompt(runtime.manifest, "story", method, seed=1)
        save_prompt(prompt, tmp_path / "story.safetensors")
        out = tmp_path / "kv.safetensors"
        convert_prompt(tmp_path / "story.safetensors", out, target="kv", base=tiny_llama_package)
        runtime.add_prompt(prompt)
        runtime.add_prompt(_as_prefix(prompt, out))
        for text in TEXTS:
            assert np.array_equal(runtime.logits(text, prompt="kv"), runtime.logits(text, prompt="story"))
        with safe_open(out, "numpy") as opened:
            said = json.loads(opened.metadata()["edgeprompt_kv"])
    assert said["weights_hash"] == runtime.manifest.weights_hash
    assert said["prompt_sha256"] == prompt.sha256
    assert said["length"] == 4


def test_what_cannot_be_a_prefix_is_rejected(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        manifest = runtime.manifest
    inside = make_prompt(manifest, "inside", template=Template.parse("{text}{prompt}"))
    other = make_prompt(manifest, "other")
    other = dataclasses.replace(other, base=dataclasses.replace(other.base, fingerprint="sha256:0"))
    for prompt, kind, base in (
        (inside, UnsupportedError, tiny_llama_package),
        (other, BaseMismatchError, tiny_llama_package),
        (make_prompt(manifest, "nowhere"), InputError, None),
    ):
        file = tmp_path / f"{prompt.name}.safetensors"
        save_prompt(prompt, file)
        with pytest.raises(kind):
            convert_prompt(file, tmp_path / "out.safetensors", target="kv", base=base)
        assert not (tmp_path / "out.safetensors").exists()


def test_transformers_js_takes_it(node: str, built: Path, tiny_llama_base: Path, tmp_path: Path) -> None:
    """Three tasks on one loaded model, on a graph whose prompt input is optional, in transformers.js' layout."""
    package = export_model(tiny_llama_base, tmp_path / "package", prompt_input="optional").path
    model = tmp_path / "models/tiny"
    (model / "onnx").mkdir(parents=True)
    for file in package.glob("model.onnx*"):
        shutil.copy(file, model / "onnx")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(tiny_llama_base / name, model)
    with edgeprompt.load(package, options=QUIET) as runtime:
        calls, expected = [], []
        for seed, text in enumerate(TEXTS):
            prompt = make_prompt(runtime.manifest, f"story{seed % 3}", seed=seed % 3)
            file, out = tmp_path / "prompt.safetensors", tmp_path / f"kv{seed % 3}.safetensors"
            save_prompt(prompt, file)
            convert_prompt(file, out, target="kv", base=package)
            runtime.add_prompt(prompt)
            ids = runtime._package.tokenizer.encode(text)
            calls.append({"ids": ids, "kv": str(out)})
            answer = runtime.generate(input_ids=ids, prompt=prompt.name, max_new_tokens=10)
            expected.append(list(answer.token_ids))
    asked = {"models": f"{tmp_path}/models/", "model": "tiny", "calls": calls, "maxNewTokens": 10}
    done = subprocess.run(
        [node, built / "test/transformers.mjs"], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [[token for token in one if token != 0] for one in found] == expected
    assert len({tuple(one) for one in expected}) > 1
