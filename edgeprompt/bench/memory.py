"""Resident memory of this process: its peak, and how much of it is anonymous or backed by files."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def peak_rss() -> int | None:
    """Bytes of the largest resident set that this process had; None where the system does not tell."""
    found = _fields().get("VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def split_rss() -> dict[str, int]:
    """Bytes now resident: "anonymous" and "file" (mapped files and shared memory); empty where not told (not Linux)."""
    found = _fields()
    if "RssAnon" not in found:
        return {}
    return {"anonymous": found["RssAnon"], "file": found["RssFile"] + found.get("RssShmem", 0)}


class PeakSplit:
    """Largest anonymous and file-backed parts while it is open, looked at every 5 ms."""

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakSplit:
        try:
            self._thread.start()
        except BaseException:  # a signal: nobody calls __exit__ then
            self._stop.set()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for part, size in split_rss().items():
                self.peak[part] = max(size, self.peak.get(part, 0))
            if self._stop.wait(0.005):
                return


def _fields() -> dict[str, int]:
    try:
        text = _STATUS.read_text()
    except OSError:
        return {}
    lines = (line.split() for line in text.splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if len(parts) == 3 and parts[2] == "kB"}
