"""Says before work starts whether a base fits into memory, instead of being killed halfway."""

from __future__ import annotations

from pathlib import Path

from edgeprompt.errors import CapacityError

LOAD = 4.2
"""Bytes a parameter for a base in float32."""
EXPORT = 7.5
"""The same for an export with its validation: the base, and what is written of it. A Llama of 1.24 billion parameters
took 7.7 at int4."""


def check_memory(given: str, parameters: int, *, per_parameter: float = LOAD) -> None:
    """Refuse a base that memory is too small for.

    Args:
        given: The base as the user named it.
        parameters: How many there are.
        per_parameter: Bytes that the work takes for each.

    Raises:
        CapacityError: says what is needed and what is free; never where the system does not say what is free.
    """
    free, needed = free_memory(), int(parameters * per_parameter)
    if free is not None and needed > free:
        raise CapacityError(
            f"{given!r} has {parameters / 1e9:.2f} billion parameters and needs about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; close other programs, or use a machine with more memory"
        )


def free_memory() -> int | None:
    """Bytes that can be used before the process is killed: of the machine with its swap, and of its container."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        free = values["MemAvailable"] + values.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    container = Path("/sys/fs/cgroup")
    try:
        limit = int((container / "memory.max").read_text("ascii"))
        used = int((container / "memory.current").read_text("ascii"))
        stats = dict(line.split() for line in (container / "memory.stat").read_text("ascii").splitlines())
        free = min(free, limit - used + int(stats.get("inactive_file", 0)) + int(stats.get("active_file", 0)))
    except (OSError, ValueError):
        pass  # no container, or no limit ("max")
    return free
