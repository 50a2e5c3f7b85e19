"""The tokenizer that is read beside a session (`tests/test_manifest.py` has what makes a package be refused)."""

import shutil

import pytest

import edgeprompt
from edgeprompt.errors import PackageError
from edgeprompt.package import open_package


def test_a_tokenizer_read_ahead_is_the_tokenizer(tiny_llama_package):
    ahead, plain = open_package(tiny_llama_package), open_package(tiny_llama_package)
    ahead.read_ahead()
    ahead.read_ahead()
    assert ahead.tokenizer is ahead.tokenizer
    assert ahead.tokenizer.encode("Once upon a time") == plain.tokenizer.encode("Once upon a time")
    plain.read_ahead()
    assert "_ahead" not in vars(plain), "one that is there is not read again"


def test_a_broken_tokenizer_read_ahead_is_told_to_whoever_asks(tiny_llama_package, tmp_path, capfd):
    folder = shutil.copytree(tiny_llama_package, tmp_path / "package")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    package = open_package(folder)
    package.read_ahead()
    for _ in range(2):
        with pytest.raises(PackageError, match="cannot read the tokenizer"):
            _ = package.tokenizer
    with pytest.raises(PackageError, match="cannot read the tokenizer"):
        edgeprompt.load(folder)
    assert capfd.readouterr().err == ""
