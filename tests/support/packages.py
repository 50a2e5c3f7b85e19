"""Packages for tests, made from others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgeprompt import names
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
