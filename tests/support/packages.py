"""Packages for tests, made from others."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from edgeprompt import names
from edgeprompt.package.files import fingerprint_tokenizer
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest


def growing_package(package: Path, folder: Path) -> Path:
    """A decoder's package whose manifest says that its graph does not append in place, with links to the same files.

    Without shared buffers GroupQueryAttention returns past and new keys joined, as other exporters' graphs do.
    """
    target = folder / "growing"
    target.mkdir()
    for file in package.iterdir():
        if file.name != names.MANIFEST:
            (target / file.name).symlink_to(file)
    manifest = Manifest.from_json((package / names.MANIFEST).read_text(encoding="utf-8"))
    dataclasses.replace(manifest, kv_in_place=False).write(target)
    return target


def with_more_tokens(folder: Path, *tokens: str) -> None:
    """Adds tokens to a tokenizer without giving the base embeddings for them, as `add_tokens` alone does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    assert len(tokenizer) > 512
    tokenizer.save_pretrained(folder)


def package_before_the_check(package: Path, folder: Path, *tokens: str) -> Path:
    """A package as it was exported before export refused it: its tokenizer has more tokens than the base."""
    shutil.copytree(package, folder)
    with_more_tokens(folder, *tokens)
    fingerprint = fingerprint_tokenizer((folder / names.TOKENIZER).read_bytes())
    manifest = open_package(folder).manifest
    dataclasses.replace(manifest, tokenizer_fingerprint=fingerprint, tokenizer_sha256=None).write(folder)
    return folder
