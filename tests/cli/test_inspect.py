"""`inspect`: a package, a prompt file, an adapter; anything else is refused."""

import dataclasses
import json
import shutil

import numpy as np
import onnxruntime
import pytest

from edgeprompt import save_prompt
from edgeprompt.errors import PackageError
from edgeprompt.package.fingerprint import parse
from edgeprompt.package.folder import open_package
from tests.support.files import IRREGULAR, make_irregular


def test_package(cli, tiny_llama_package):
    result = cli("inspect", tiny_llama_package, "--json")
    facts = json.loads(result.stdout)
    manifest = open_package(tiny_llama_package).manifest
    assert facts["fingerprint"] == manifest.base.fingerprint
    assert facts["architecture"] == "decoder-only (llama)"
    assert facts["hidden_size"] == 64
    assert facts["size_bytes"] == sum(file.stat().st_size for file in tiny_llama_package.rglob("*") if file.is_file())
    lines = cli("inspect", tiny_llama_package).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(facts)


def test_prompt_file(cli, prompt_folder):
    path = prompt_folder / "sentiment.safetensors"
    facts = json.loads(cli("inspect", path, "--json").stdout)
    assert facts["kind"] == "prompt file"
    assert facts["tensors"] == {"prompt_embeddings": "float32 [4, 64]"}
    assert facts["verbalizer"] == {"negative": [" bad"], "positive": [" good"]}
    lines = cli("inspect", path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(facts)
    assert any('negative=" bad"' in line for line in lines)


def test_what_a_terminal_would_act_on_is_escaped(cli, make_prompt, tmp_path):
    words = {"x\x07": (" good",), "y": (" bad",)}
    path = tmp_path / "odd.safetensors"
    save_prompt(dataclasses.replace(make_prompt("odd", verbalizer=words), name="a\x1b[2J\u202eb"), path)
    shown = cli("inspect", path).stdout
    assert shown.replace("\n", "").isprintable()
    assert '"a\\u001b[2J\\u202eb"' in shown
    assert '"x\\u0007"=" good"' in shown


def test_adapter(cli, tmp_path):
    path = tmp_path / "task.onnx_adapter"
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(7)
    rows = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((5, 8), np.float32))
    adapter.set_parameters({"prompt_embeddings": rows})
    adapter.export_adapter(str(path))
    facts = json.loads(cli("inspect", path, "--json").stdout)
    assert facts["num_virtual_tokens"] == 5
    assert facts["tensors"] == {"prompt_embeddings": "float32 [5, 8]"}
    assert facts["model_version"] == 7


def test_refusals(refused, tmp_path):
    assert "nothing is at" in refused("inspect", tmp_path / "none")
    assert "is no package" in refused("inspect", tmp_path)
    other = tmp_path / "x.bin"
    other.write_bytes(b"abc")
    assert "known: package folders" in refused("inspect", other)
    adapter = tmp_path / "x.onnx_adapter"
    adapter.write_bytes(b"abc")
    assert "cannot read adapter" in refused("inspect", adapter)
    prompt = tmp_path / "x.safetensors"
    prompt.write_bytes(b"abc")
    assert "bad prompt file" in refused("inspect", prompt)


@pytest.mark.parametrize("kind", [kind for kind in IRREGULAR if kind != "a folder"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.onnx_adapter"])
def test_only_regular_files_are_read(refused, tmp_path, kind, name):
    path = make_irregular(kind, tmp_path / name)
    assert f"it is {kind}, and only regular files are read" in refused("inspect", path)


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", ["edgeprompt.json", "tokenizer.json"])
def test_a_package_whose_files_are_none(tiny_llama_package, tmp_path, kind, name):
    home = tmp_path / "package"
    shutil.copytree(tiny_llama_package, home)
    (home / name).unlink()
    make_irregular(kind, home / name)
    with pytest.raises(PackageError, match=f"it is {kind}"):
        _ = open_package(home).tokenizer


def test_a_fingerprint_of_the_older_format_is_told(cli, tiny_llama_package, make_prompt, tmp_path):
    """Everybody who reads it should know that a fine-tuned base would pass."""
    import shutil
    from dataclasses import replace

    from edgeprompt.package.folder import open_package

    folder = shutil.copytree(tiny_llama_package, tmp_path / "package")
    manifest = open_package(folder).manifest
    digits = parse(manifest.base.fingerprint).first
    old = replace(manifest.base, fingerprint="sha256:" + digits + "0" * 48)
    replace(manifest, base=old).write(folder)
    save_prompt(make_prompt("old", base=old), tmp_path / "old.safetensors")
    for path in (folder, tmp_path / "old.safetensors"):
        assert "covers its embedding alone" in cli("inspect", path).stdout
        assert "is of format 1" in json.loads(cli("inspect", path, "--json").stdout)["fingerprint_note"]
    assert "fingerprint_note" not in cli("inspect", tiny_llama_package).stdout
