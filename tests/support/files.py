"""Things in a file system that are no files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

IRREGULAR = ("a folder", "a pipe", "a socket", "a device")


def make_irregular(kind: str, path: Path) -> Path:
    """What stands where a file is expected, and would be waited for, or read for ever."""
    match kind:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "a device":
            path.symlink_to("/dev/zero")
    return path
