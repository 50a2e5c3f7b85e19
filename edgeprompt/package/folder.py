"""An exported package on disk, opened and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprompt import names
from edgeprompt.errors import PackageError
from edgeprompt.package import hub
from edgeprompt.package.files import read_regular, sha256_file
from edgeprompt.package.manifest import MAX_BYTES, Manifest

if TYPE_CHECKING:
    from edgeprompt.package.tokenizer import Tokenizer

HASHED_AT_LOAD = 16 << 20
"""Bytes; a larger graph file holds weights, whose hash would cost a noticeable part of a cold start."""


@dataclass(frozen=True)
class Package:
    """A folder with a manifest, its graphs and its tokenizer."""

    path: Path
    manifest: Manifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer.

        Raises:
            PackageError: missing, broken, or another than the manifest names.
        """
        if self.manifest.tokenizer_fingerprint is None and not (self.path / names.TOKENIZER).exists():
            raise PackageError(
                f"the package in {str(self.path)!r} has no {names.TOKENIZER}: its base had none when it was exported; "
                "export it again with its tokenizer's files beside the model"
            )
        from edgeprompt.package.tokenizer import Tokenizer  # here: its library is imported beside the sessions

        tokenizer = Tokenizer(self.path, self.manifest.geometry.vocab_size)
        expected = self.manifest.tokenizer_fingerprint
        # The file's hash is quick; where it differs, the fingerprint says whether it is the same tokenizer after all.
        unchanged = tokenizer.sha256 == self.manifest.tokenizer_sha256
        if expected and not unchanged and tokenizer.fingerprint != expected:
            raise PackageError(
                f"{names.TOKENIZER} in {str(self.path)!r} has fingerprint {tokenizer.fingerprint}, "
                f"the manifest names {expected}; export the base again"
            )
        return tokenizer

    def graph(self, key: str) -> Path:
        """Path of a graph: "model", "encoder" or "decoder". Its hash is checked; `verify` checks the weights as well.

        Raises:
            PackageError: it is another file than the manifest names.
        """
        graph = self.manifest.graphs[key]
        path = self.path / graph.file
        if path.stat().st_size <= HASHED_AT_LOAD:
            _check_hash(path, graph.sha256)
        return path

    @property
    def prompt_paths(self) -> tuple[Path, ...]:
        """Prompt files that travel in the package."""
        return tuple(self.path / name for name in self.manifest.prompts)

    def verify(self) -> None:
        """Compare every graph and data file with the manifest's hashes (reads them whole).

        Raises:
            PackageError: a file differs; both hashes are named.
        """
        for graph in self.manifest.graphs.values():
            for name, expected in {graph.file: graph.sha256, **graph.data}.items():
                _check_hash(self.path / name, expected)


def _download(wanted: hub.HubPath) -> Path:
    """The folder of a package from the Hub: what its manifest names, and no other file of the repository."""
    inside = "" if wanted.file is None else f"{wanted.file.rstrip('/')}/"

    def files(manifest_file: Path) -> list[tuple[str, bool]]:
        manifest = Manifest.from_json(read_regular(manifest_file, MAX_BYTES))
        needed = [name for graph in manifest.graphs.values() for name in (graph.file, *graph.data)]
        optional = (names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)
        return [
            *((f"{inside}{name}", True) for name in (*needed, *manifest.prompts)),
            *((f"{inside}{name}", False) for name in optional),
        ]

    found = hub.fetch(wanted, f"{inside}{names.MANIFEST}", files, what="package")
    return found.folder / inside


def _check_hash(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise PackageError(f"{path.name} has SHA-256 {found}, the manifest names {expected}; export the base again")


def open_package(path: str | os.PathLike[str]) -> Package:
    """Open a package: read and check its manifest, and that its files are there.

    Args:
        path: a folder, or `user/repo[@revision][/folder]` on the Hugging Face Hub.

    Raises:
        PackageError: no package, a broken manifest, or a file is missing.
        HubError: it cannot be had from the Hub.
    """
    if not isinstance(path, str | os.PathLike):
        raise PackageError(f"a package is a folder, found {path!r}; give its path")
    folder = Path(path)
    if not folder.exists() and (wanted := hub.parse(path)) is not None:
        folder = _download(wanted)
    file = folder / names.MANIFEST
    try:
        if not folder.is_dir():
            raise PackageError(f"no package folder at {str(folder)!r}; edgeprompt export makes one")
        manifest = Manifest.from_json(read_regular(file, MAX_BYTES))
    except FileNotFoundError as error:
        raise PackageError(
            f"{str(folder)!r} is no package: it has no {names.MANIFEST}; edgeprompt export makes one"
        ) from error
    except OSError as error:
        raise PackageError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    for graph in manifest.graphs.values():
        for name in (graph.file, *graph.data):
            if not (folder / name).is_file():
                raise PackageError(f"package {str(folder)!r} lacks {name!r}; export the base again")
    return Package(folder, manifest)
