"""The manifest and the package it describes."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from edgeprompt.base.source import read_json
from edgeprompt.errors import PackageError, SourceError
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Base, Geometry, GraphFile, Manifest, Tokens


def make_manifest(**changes):
    manifest = Manifest(
        architecture="decoder-only",
        model_type="llama",
        base=Base("tiny", "sha256:0"),
        geometry=Geometry(10, 4, 2, 2, 1, 2, 128),
        tokens=Tokens(bos=1, eos=(2, 3)),
        precision="int4",
        route="torch",
        graphs={"model": GraphFile("model.onnx", "0" * 64, {"model.onnx.data": "1" * 64})},
        prompts=("prompts/a.safetensors",),
    )
    return dataclasses.replace(manifest, **changes)


def test_round_trip():
    manifest = make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json()).weights_hash == manifest.weights_hash


def test_weights_hash_follows_the_weights():
    other = make_manifest(graphs={"model": GraphFile("model.onnx", "0" * 64, {"model.onnx.data": "2" * 64})})
    assert other.weights_hash != make_manifest().weights_hash
    assert make_manifest(precision="int8").weights_hash == make_manifest().weights_hash


HOSTILE = [
    (lambda m: m.update(format="x"), "format"),
    (lambda m: m.update(version=9), "contract version 9"),
    (lambda m: m.update(other=1), "unknown key 'other'"),
    (lambda m: m.update(extra=1), "extra must be dict"),
    (lambda m: m.pop("geometry"), "lacks key 'geometry'"),
    (lambda m: m["geometry"].update(vocab_size="10"), "vocab_size must be int"),
    (lambda m: m["geometry"].update(hidden_size=-1), "hidden_size is -1"),
    (lambda m: m.update(precision="int2"), "int2"),
    (lambda m: m.update(architecture="rnn"), "rnn"),
    (lambda m: m.update(graphs={}), "graphs are"),
    (lambda m: m["graphs"]["model"].update(file="../model.onnx"), "points out of the package"),
    (lambda m: m["graphs"]["model"].update(file="/etc/passwd"), "points out of the package"),
    (lambda m: m["graphs"]["model"].update(data={"../x": "0"}), "points out of the package"),
    (lambda m: m.update(prompts=["../../x.safetensors"]), "points out of the package"),
    (lambda m: m["graphs"]["model"].update(data={"x": 5}), "hash must be str"),
    (lambda m: m["tokens"].update(eos=[[0]]), "tokens.eos must be int"),
    (lambda m: m["tokens"].update(pad=-1), "tokens.pad is -1"),
    (lambda m: m.update(kv_in_place="no"), "kv_in_place must be bool"),
    (lambda m: m.update(tokenizer_fingerprint=5), "tokenizer_fingerprint must be str or null"),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE)
def test_hostile_manifests_are_refused(change, says):
    data = json.loads(make_manifest().to_json())
    change(data)
    with pytest.raises(PackageError, match=says):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format":1,"format":2}', "\xff", "NaN", "[1e999]", "[" * 100_000])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(PackageError, match=r"bad edgeprompt\.json"):
        Manifest.from_json(text.encode("latin-1"))


@pytest.fixture
def folder(tmp_path):
    package = tmp_path / "dist"
    package.mkdir()
    (package / "model.onnx").write_bytes(b"graph")
    (package / "model.onnx.data").write_bytes(b"weights")
    graph = GraphFile("model.onnx", hashlib.sha256(b"graph").hexdigest(), {"model.onnx.data": "1" * 64})
    make_manifest(graphs={"model": graph}).write(package)
    return package


def test_open_package(folder):
    assert open_package(folder).graph("model") == folder / "model.onnx"


def test_another_graph_is_refused_when_it_is_asked_for(folder):
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(PackageError, match=r"model\.onnx has SHA-256"):
        open_package(folder).graph("model")


def test_a_lacking_file_is_named(folder):
    (folder / "model.onnx.data").unlink()
    with pytest.raises(PackageError, match=r"lacks 'model\.onnx\.data'"):
        open_package(folder)


def test_no_package(folder):
    with pytest.raises(PackageError, match="no package folder"):
        open_package(folder / "nothing")
    (folder / "edgeprompt.json").unlink()
    with pytest.raises(PackageError, match="is no package"):
        open_package(folder)


def test_changed_weights_are_found(folder):
    with pytest.raises(PackageError, match="SHA-256"):
        open_package(folder).verify()


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(PackageError, match="tokenizer"):
        _ = open_package(folder).tokenizer


@pytest.mark.parametrize(("old", "new"), [("input", "required"), ("adapter", "optional")])
def test_the_old_name_of_the_prompt_input_is_read(tiny_llama_package: Path, old: str, new: str):
    data = json.loads((tiny_llama_package / "edgeprompt.json").read_text(encoding="utf-8"))
    del data["prompt_input"]
    assert Manifest.from_json(json.dumps({**data, "door": old})).prompt_input == new
    with pytest.raises(PackageError, match="prompt_input is 'gate', allowed: required, optional"):
        Manifest.from_json(json.dumps({**data, "door": "gate"}))


@pytest.mark.parametrize("batched", [True, False])
def test_older_packages_say_how_the_kv_cache_grows_in_other_words(batched: bool):
    data = json.loads(make_manifest().to_json())
    del data["kv_in_place"]
    old = {**data, "pads_right": not batched, "batched_prefill": batched}
    assert Manifest.from_json(json.dumps(old)).kv_in_place is not batched
    assert Manifest.from_json(json.dumps(data)).kv_in_place


def test_a_number_of_too_many_digits_is_told_plainly(tmp_path):
    """Before, the message was about sys.set_int_max_str_digits()."""
    text = '{"format": ' + "9" * 5000 + "}"
    with pytest.raises(PackageError, match=r"the number 999999999\.\.\. has 5000 digits"):
        Manifest.from_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json': the number 999999999\.\.\. has 5000 digits"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(SourceError, match="nested too deeply"):
        read_json(tmp_path / "config.json")
