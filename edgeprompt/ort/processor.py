"""What decides how ONNX Runtime multiplies integers here, and on how many threads."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
_NAMED = ("model name", "flags", "features", "cpu part")


@cache
def cores() -> int:
    """Physical cores, which is what ONNX Runtime takes one thread for by default."""
    siblings = TOPOLOGY.glob("cpu[0-9]*/topology/thread_siblings_list")
    try:
        return len({file.read_text("ascii") for file in siblings}) or os.cpu_count() or 1
    except OSError:
        return os.cpu_count() or 1


@cache
def describe() -> str:
    """Name and instructions of the first core, as far as the system tells them."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in lines if line.lower().startswith(_NAMED))


def saturates() -> bool:
    """Whether products of unsigned and signed bytes may be added in 16 bits: x86 that is not known to have VNNI."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "x86") and "vnni" not in describe()
