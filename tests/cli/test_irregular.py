"""Pipes and devices where a file is expected: one line at once, nothing is waited for or read for ever."""

import json
import os
import shutil

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")


@pytest.fixture
def pipe(tmp_path):
    def make(name):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["texts.txt", "texts.csv", "texts.jsonl", "texts"])
def test_data(name, pipe, refused, tiny_llama_package, tiny_llama_base, prompt_folder, tmp_path):
    path = pipe(name)
    prompt = prompt_folder / "sentiment.safetensors"
    for args in (
        ("run", tiny_llama_package, "--input", path),
        ("eval", tiny_llama_package, path, "--prompt", prompt),
        ("tune", tiny_llama_base, path, "-o", tmp_path / "p.safetensors"),
    ):
        assert "a pipe" in refused(*args), args


def test_the_texts_that_a_package_is_judged_by(pipe):
    from edgeprompt.errors import DataError
    from exporters.validate.quality import read_texts

    with pytest.raises(DataError, match="it is a pipe"):
        read_texts(pipe("texts.txt"))


@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_an_older_result_of_bench(device, pipe, refused, tiny_llama_package, tmp_path):
    path = pipe("old.json") if device == "pipe" else tmp_path / "old.json"
    if device != "pipe":
        path.symlink_to(device)
    assert "only regular files are read" in refused("bench", tiny_llama_package, "--compare", path)


def test_a_base(pipe, refused, tiny_llama_base, tmp_path):
    assert "is a pipe or a device" in refused("export", pipe("base"), "-o", tmp_path / "package")
    for name in ("config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        folder = shutil.copytree(tiny_llama_base, tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert "it is a pipe" in refused("export", folder, "-o", tmp_path / "package")


@pytest.mark.parametrize("value", [["llama"], None, {"a": 1}, 3])
def test_a_model_type_that_is_no_text(value, refused, tiny_llama_base, tmp_path):
    folder = shutil.copytree(tiny_llama_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": value}))
    assert "names no model_type" in refused("export", folder, "-o", tmp_path / "package")
