"""A prompt as keys and values: equal to the prompt itself, and taken by unmodified transformers.js."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import edgeprompt
from edgeprompt.errors import BaseMismatchError, InputError, UnsupportedError
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.file import PromptFile, save_prompt
from edgeprompt.prompts.template import Template
from exporters import export_model, layout
from exporters.convert import convert_prompt
from tests.support.prompts import make_infix, make_prompt
from tests.support.runtimes import QUIET

ROOT = Path(__file__).resolve().parents[2]
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


def test_what_float16_cannot_hold_is_refused(tiny_llama_package: Path, tmp_path: Path) -> None:
    """It was written as infinity, with numpy's warning and exit code 0."""
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        prompt = make_prompt(runtime.manifest, "story", "prefix-tuning", seed=1)
    assert prompt.past_key_values is not None
    past = prompt.past_key_values.astype(np.float32)
    past[0, 0, 0, 0, 0] = -70000
    save_prompt(dataclasses.replace(prompt, past_key_values=past), tmp_path / "story.safetensors")
    out = tmp_path / "kv.safetensors"
    with pytest.raises(UnsupportedError, match=r"reach 7e\+04, and float16 ends at 6\.55e\+04; write them as float32"):
        convert_prompt(tmp_path / "story.safetensors", out, target="kv", base=tiny_llama_package, kv_dtype="float16")
    assert not out.exists()
    convert_prompt(tmp_path / "story.safetensors", out, target="kv", base=tiny_llama_package)
    assert load_file(out)["past_key_values.0.key"].min() == -70000


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
    infix = make_infix(manifest, "infix", "{text}{prompt} is")
    other = make_prompt(manifest, "other")
    other = dataclasses.replace(other, base=dataclasses.replace(other.base, fingerprint="sha256:0"))
    for prompt, kind, base in (
        (inside, UnsupportedError, tiny_llama_package),
        (infix, UnsupportedError, tiny_llama_package),
        (other, BaseMismatchError, tiny_llama_package),
        (make_prompt(manifest, "nowhere"), InputError, None),
    ):
        file = tmp_path / f"{prompt.name}.safetensors"
        save_prompt(prompt, file)
        with pytest.raises(kind):
            convert_prompt(file, tmp_path / "out.safetensors", target="kv", base=base)
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("target", "out"), [("kv", "a.safetensors"), ("npy", "a.npy"), ("peft", "a"), ("onnx-adapter", "a.onnx_adapter")]
)
def test_keys_and_values_inside_the_text_stay_a_prompt_file(
    target: str, out: str, tiny_llama_package: Path, tmp_path: Path
) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        prompt = make_infix(runtime.manifest, "infix", "{text}{prompt} is")
    save_prompt(prompt, tmp_path / "infix.safetensors")
    with pytest.raises(UnsupportedError, match="inside its text"):
        convert_prompt(tmp_path / "infix.safetensors", tmp_path / out, target=target, base=tiny_llama_package)
    assert not (tmp_path / out).exists()


def test_half_precision(tiny_llama_package: Path, tmp_path: Path) -> None:
    prompt = make_prompt(edgeprompt.load(tiny_llama_package, options=QUIET).manifest, "story")
    save_prompt(prompt, tmp_path / "story.safetensors")
    found = {}
    for dtype in ("float32", "float16"):
        out = tmp_path / f"{dtype}.safetensors"
        convert_prompt(tmp_path / "story.safetensors", out, target="kv", base=tiny_llama_package, kv_dtype=dtype)
        found[dtype] = load_file(out)
    for name, value in found["float16"].items():
        assert value.dtype == np.float16
        assert np.array_equal(value, found["float32"][name].astype(np.float16))


class Asked:
    """Questions to transformers.js on a model folder: three tasks by turns, and what our runtime answers."""

    def __init__(self, package: Path, model: Path, folder: Path, kv_dtype: str = "float32") -> None:
        self.model, self.expected = model, []
        self._calls = []
        with edgeprompt.load(package, options=QUIET) as runtime:
            for index, text in enumerate(TEXTS):
                prompt = make_prompt(runtime.manifest, f"story{index % 3}", seed=index % 3)
                file, out = folder / "prompt.safetensors", folder / f"kv{index % 3}.safetensors"
                save_prompt(prompt, file)
                convert_prompt(file, out, target="kv", base=package, kv_dtype=kv_dtype)
                runtime.add_prompt(prompt if kv_dtype == "float32" else _as_prefix(prompt, out), name=prompt.name)
                ids = runtime._package.tokenizer.encode(text)
                answer = runtime.generate(input_ids=ids, prompt=prompt.name, max_new_tokens=10)
                self.expected.append(list(answer.token_ids))
                self._calls.append({"ids": ids, "kv": str(out)})

    def answers(self, node: str, script: Path, **more: Any) -> Any:
        """What the script says: tokens, up to the end token."""
        asked = {
            "models": f"{self.model.parent}/", "model": self.model.name, "calls": self._calls, "maxNewTokens": 10,
            **more,
        }  # fmt: skip
        done = subprocess.run(
            [node, script], input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said = json.loads(done.stdout.splitlines()[-1])
        return {**said, "found": [[token for token in one if token != 0] for one in said["found"]]}


@pytest.fixture(scope="module")
def hub(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for the web in transformers.js' layout, its weights in several files."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "WEB_FILE", 20_000)
        return export_model(tiny_llama_base, folder, target="web", layout="hub").path


@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
def test_transformers_js_on_our_package(node: str, built: Path, hub: Path, tmp_path: Path, kv_dtype: str) -> None:
    """As it was exported, nothing copied or renamed; its tokenizer too."""
    asked = Asked(hub, hub, tmp_path, kv_dtype)
    said = asked.answers(node, built / "test/transformers.mjs", texts=TEXTS)
    assert said["found"] == asked.expected
    assert len({tuple(one) for one in asked.expected}) > 1
    tokenizer = open_package(hub).tokenizer
    assert said["encoded"] == [list(tokenizer.encode(text)) for text in TEXTS]


def test_transformers_js_in_the_browser(
    node: str, built: Path, chromium: dict[str, Any], hub: Path, tmp_path: Path
) -> None:
    asked = Asked(hub, hub, tmp_path)
    assert asked.answers(node, built / "test/transformers-browser.mjs", **chromium)["found"] == asked.expected


def test_transformers_js_on_a_graph_without_prompt_input(
    node: str, built: Path, chromium: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Optimum's graph in onnx-community's layout: its package computes the prefix, the graph as it was serves it."""
    model = tmp_path / "models/llama"
    shutil.copytree(ROOT / "tests/golden/onnx/llama", model)
    tiny_tokenizer.save_pretrained(model)
    (model / "onnx").mkdir()
    (model / "model.onnx").rename(model / "onnx/model.onnx")
    package = export_model(model, tmp_path / "package", route="onnx").path
    asked = Asked(package, model, tmp_path)
    assert asked.answers(node, built / "test/transformers.mjs")["found"] == asked.expected
    in_browser = asked.answers(node, built / "test/transformers-browser.mjs", **chromium, dtype="fp32")
    assert in_browser["found"] == asked.expected
    assert len({tuple(one) for one in asked.expected}) > 1


def test_the_documents_lines_are_the_examples() -> None:
    example = (ROOT / "js/examples/transformers/prefix.mjs").read_text("utf-8")
    body = example[example.index("export function prefixOf") : example.index("/** A number in half")].strip()
    assert body in (ROOT / "docs/javascript.md").read_text("utf-8")
