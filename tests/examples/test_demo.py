"""The demo's tables, on a tiny package: `make demo` itself takes minutes on a real model."""

import sys
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt import PromptFile, save_prompt
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.template import Template

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    monkeypatch.setattr(demo, "EVAL_ROWS", 4)
    monkeypatch.setattr(demo, "SHOT_ROWS", 2)
    monkeypatch.setattr(demo, "REPEATS", 2)
    yield demo
    for name in ("demo", "models"):
        del sys.modules[name]


@pytest.fixture
def prompts(tiny_llama_base, tmp_path):
    """A package with room for 8 shots, and prompts named like the shipped ones."""
    import json

    from exporters import export_model

    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_llama_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    package = export_model(base, tmp_path / "package").path
    manifest = open_package(package).manifest
    rows = np.random.default_rng(0).normal(size=(4, manifest.geometry.hidden_size)).astype(np.float32)
    labels = {
        "mine": ("negative", "positive"),
        "source": ("movie", "product", "tweets", "news"),
        "restore": (),
    }
    files = {}
    for name, words in labels.items():
        prompt = PromptFile(
            name,
            "prompt-tuning",
            "classify" if words else "generate",
            manifest.base,
            Template.parse("{prompt}{text}\nAnswer:"),
            prompt_embeddings=rows,
            verbalizer={word: (f" {word}",) for word in words},
        )
        files[name] = tmp_path / f"{name}.safetensors"
        save_prompt(prompt, files[name])
    return package, files


def test_tables(demo, prompts):
    package, files = prompts
    shipped = {name: files[name] for name in ("source", "restore")}
    table = demo.accuracy_table(package, files["mine"], shipped)
    assert list(table.columns[1].cells) == [
        *("mine", "zero-shot", "8-shot hard prompt"),
        *("source", "zero-shot", "restore", "zero-shot"),
    ]
    with edgeprompt.load(package) as runtime:
        tasks = [runtime.add_prompt(file) for file in files.values()]
        mixed = demo.mixed_table(runtime, tasks)
        assert list(mixed.columns[1].cells) == ["mine", "source", "restore"] * 2
        assert set(list(mixed.columns[2].cells)[:2]) <= {"negative", "positive", "movie", "product", "tweets", "news"}
        costs = demo.cost_table(runtime, files["mine"], tasks)
    assert {cell.rsplit(" ", 1)[1] for cell in costs.columns[1].cells} == {"ms", "kB"}
    assert "right after another task" in "".join(costs.columns[0].cells)
