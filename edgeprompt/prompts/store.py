"""A folder of prompt files, found by name when a request first asks for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgeprompt.errors import InputError

SUFFIX = ".safetensors"


class PromptStore:
    """Prompt `name` is the file `name.safetensors`; nothing is read before it is asked for."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a folder.

        Raises:
            InputError: there is no such folder.
        """
        self._folder = Path(folder).absolute()
        if not self._folder.is_dir():
            raise InputError(f"no folder of prompts at {str(folder)!r}")

    def __iter__(self) -> Iterator[str]:
        """Names that are there now."""
        return iter(sorted(path.stem for path in self._folder.glob(f"*{SUFFIX}")))

    def find(self, name: str) -> tuple[Path, tuple[int, int, int]] | None:
        """The file of a name and its stamp (which changes when the file is replaced), or None."""
        if name != os.path.basename(name) or "\0" in name or name.startswith("."):
            return None
        path = self._folder / (name + SUFFIX)
        try:
            status = path.stat()
        except OSError:
            return None
        return path, (status.st_ino, status.st_mtime_ns, status.st_size)
