"""Files read into memory beside their use, as far as they are not there yet.

ONNX Runtime maps weights and waits for every page of them that lies on disk. Read as a whole, from the moment that a
start knows which they are, most are there when it comes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

SHARE = 4
"""Only files that take together less than this part of the machine's memory are read: more would drive out others."""


def read_ahead(paths: Sequence[Path]) -> threading.Thread | None:
    """Begin to read files in a thread, which is returned; None where the system is not Linux, or they are too large.

    The system sends them to nowhere: one call for each file, without Python's lock, that copies nothing. What is in
    memory already costs some milliseconds a gigabyte.
    """
    if sys.platform != "linux":
        return None
    try:
        size = sum(path.stat().st_size for path in paths)
    except OSError:
        return None  # whoever opens it says what is wrong
    if size * SHARE > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    thread = threading.Thread(target=_read_all, args=(paths,), name="edgeprompt-read-ahead", daemon=True)
    thread.start()
    return thread


def _read_all(paths: Sequence[Path]) -> None:
    try:
        with open(os.devnull, "wb") as nowhere:
            for path in paths:
                with path.open("rb") as file:
                    at, size = 0, os.fstat(file.fileno()).st_size
                    while at < size and (sent := os.sendfile(nowhere.fileno(), file.fileno(), at, size - at)):
                        at += sent
    except OSError:
        pass  # a file system that cannot: it is only slower
