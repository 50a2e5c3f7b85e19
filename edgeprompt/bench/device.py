"""What the numbers were measured on: processor, clock, memory, system, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "asimddp": "NEON dotprod",
    "i8mm": "NEON i8mm",
    "sve": "SVE",
}
"""/proc/cpuinfo's name -> the usual name, of the extensions that matrix kernels are chosen by."""

_MAC_FLAGS = {
    "hw.optional.arm.FEAT_DotProd": "NEON dotprod",
    "hw.optional.arm.FEAT_I8MM": "NEON i8mm",
    "hw.optional.avx2_0": "AVX2",
    "hw.optional.avx512f": "AVX-512",
}
_CPUS = Path("/sys/devices/system/cpu")
_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers", "safetensors")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_device() -> dict[str, Any]:
    """The device as plain data; what the system does not tell is None."""
    import edgeprompt

    return {
        "cpu": _cpu_name(),
        "isa": _isa(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "governor": _read(_CPUS / "cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory(),
        "gpu": _gpus(),
        "os": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "edgeprompt": edgeprompt.__version__,
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def clock() -> dict[str, Any]:
    """How fast the processor is now: the clock that the system names, and how long a fixed piece of work takes.

    Virtual machines name a fixed clock, so the work is what shows throttling there. 0.1 to 0.3 s.
    """
    speeds = [
        float(found) / 1000 for file in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (found := _read(file))
    ]
    if not speeds:
        lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
        speeds = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    best = min(_fixed_work() for _ in range(5))
    return {"mhz": sum(speeds) / len(speeds) if speeds else None, "fixed_work_ns": best}


def throttling(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two clocks and their ratio; `seen` where the same work became more than 10 % slower."""
    ratio = after["fixed_work_ns"] / before["fixed_work_ns"]
    return {"before": before, "after": after, "slowdown": ratio, "seen": ratio > 1.1}


def _fixed_work() -> int:
    started = time.perf_counter_ns()
    total = 0
    for value in range(300_000):
        total += value
    return time.perf_counter_ns() - started


def _cpu_name() -> str | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or None


def _isa() -> list[str]:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            there = set(value.split())
            return [name for flag, name in FLAGS.items() if flag in there]
    return [name for key, name in _MAC_FLAGS.items() if _sysctl(key) == "1"]


def _memory() -> int | None:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    found = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return found.splitlines() if found else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sysctl(key: str) -> str | None:
    return _output("sysctl", "-n", key) if platform.system() == "Darwin" else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
