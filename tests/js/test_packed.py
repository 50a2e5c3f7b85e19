"""The packed npm package, installed into an app: ES module, CommonJS, bundler, examples. All answer as Python does."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt.prompts.file import save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS

TEXTS = ["The plot is thin.", "a fine film", "Ünïcode ☃"]


def _run(command: list[Any], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def app(node: str, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which npm has installed what `npm pack` packs, with ONNX Runtime and the examples beside it."""
    folder = tmp_path_factory.mktemp("app")
    packed = _run(["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", folder], cwd=built)
    (folder / "package.json").write_text('{"private": true}\n', "utf-8")
    options = ["--offline", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=peer", "--omit=optional"]
    _run(["npm", "install", *options, folder / packed.split()[-1]], cwd=folder)
    modules = folder / "node_modules"
    assert (modules / "edgeprompt/dist/index.js").is_file()
    assert not (modules / "edgeprompt").is_symlink()
    for name in ("onnxruntime-node", "onnxruntime-web", "onnxruntime-common"):
        (modules / name).symlink_to(built / "node_modules" / name)
    for example in ("samples", "node", "page"):
        shutil.copytree(built / "examples" / example, folder / example)
    return folder


@pytest.fixture(scope="module")
def tokens(tiny_llama_package: Path) -> list[int]:
    """What Python says to the samples' question."""
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        return list(runtime.generate("a", max_new_tokens=5).token_ids)


@pytest.fixture(scope="module")
def prompts(tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tasks that classify, and one that generates."""
    folder = tmp_path_factory.mktemp("prompts")
    manifest = edgeprompt.load(tiny_llama_package, options=QUIET).manifest
    made = [
        make_prompt(manifest, "mood", verbalizer=WORDS, task="classify"),
        make_prompt(manifest, "size", verbalizer={"big": (" one",), "small": (" two",)}, task="classify", seed=1),
        make_prompt(manifest, "story", seed=2),
    ]
    for prompt in made:
        save_prompt(prompt, folder / f"{prompt.name}.safetensors")
    return [folder / f"{prompt.name}.safetensors" for prompt in made]


@pytest.mark.parametrize("name", ["esm.mjs", "commonjs.cjs"])
def test_node_samples(node: str, app: Path, tiny_llama_package: Path, tokens: list[int], name: str) -> None:
    said = _run([node, app / "samples" / name, f"{tiny_llama_package}/"], cwd=app)
    assert json.loads(said) == tokens


def test_a_bundler(
    node: str, built: Path, app: Path, chromium: dict[str, Any], tiny_llama_package: Path, tokens: list[int]
) -> None:
    sources = [app / "samples/bundled.js", app / "samples/worker.js"]
    bundler = built / "node_modules/esbuild/bin/esbuild"
    options = ["--bundle", "--minify", "--format=esm", "--external:node:*", "--external:@huggingface/jinja"]
    _run([node, bundler, *sources, *options, f"--outdir={app / 'out'}"], cwd=app)
    asked = {**chromium, "out": str(app / "out"), "model": str(tiny_llama_package)}
    assert json.loads(_run([node, built / "test/bundled.mjs"], input=json.dumps(asked))) == tokens


def test_triage(node: str, app: Path, tiny_llama_package: Path, prompts: list[Path]) -> None:
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    command = [node, app / "node/triage.mjs", tiny_llama_package, *prompts[:2]]
    found = [json.loads(line) for line in _run(command, cwd=app, input="\n".join(lines)).splitlines()]
    assert [one["id"] for one in found] == [0, 1, 2]
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for prompt in prompts[:2]:
            runtime.add_prompt(prompt)
            for text, one in zip(TEXTS, found, strict=True):
                expected = runtime.classify(text, prompt=prompt.stem)
                said = one["labels"][prompt.stem]
                assert said["label"] == expected.label
                assert abs(said["score"] - expected.scores[expected.label]) < 1e-6
    bad = subprocess.run(
        command, cwd=app, input='{"text": 1}\n{"text": "a"}\n', capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("line 1: ")
    assert len(bad.stdout.splitlines()) == 1


def test_the_page(
    node: str, built: Path, app: Path, chromium: dict[str, Any], tiny_llama_package: Path, prompts: list[Path]
) -> None:
    """Tasks are switched live; the second visit fetches no weights; the third has no server."""
    site = app / "site"
    _run([node, app / "page/build.mjs", site, tiny_llama_package, *prompts], cwd=app)
    questions = [{"task": task, "text": text} for text in TEXTS[:2] for task in ("mood", "story", "size")]
    asked = {**chromium, "site": str(site), "questions": questions}
    found = json.loads(_run([node, built / "test/page.mjs"], input=json.dumps(asked)))
    assert "/model/model.onnx.data" in found["firstFetched"]
    assert "/model/model.onnx.data" not in found["secondFetched"]
    assert not [path for path in found["secondFetched"] if path.startswith(("/ort/", "/edgeprompt/", "/prompts/"))]
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for prompt in prompts:
            runtime.add_prompt(prompt)
        for visit in ("first", "second", "offline"):
            assert found[visit]["status"].startswith("Ready in ")
            for question, said in zip(questions, found[visit]["found"], strict=True):
                assert "first token" in said["figures"]
                if question["task"] == "story":
                    generation = runtime.generate(question["text"], prompt="story", max_new_tokens=60)
                    assert said["text"] == generation.text
                    assert "tokens/s" in said["figures"] or len(generation.token_ids) < 2
                else:
                    scores = runtime.classify(question["text"], prompt=question["task"]).scores
                    assert said["labels"] == sorted(scores, key=lambda label: -scores[label])
