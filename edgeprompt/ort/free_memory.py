"""How much memory is free, and whether attention over a long text fits into it."""

from __future__ import annotations

from pathlib import Path

from edgeprompt.errors import CapacityError

_COPIES = 3
"""Matrices of one value for each two tokens and head that a graph holds at once: bias, scores and their softmax."""
SHORT = 512
"""Tokens of texts for which nobody needs to look at what is free."""


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


def attention_bytes(tokens: int, heads: int) -> int:
    """About what an encoder takes for one text: attention looks at all pairs of tokens at once."""
    return _COPIES * 4 * heads * tokens**2


def check_attention(tokens: int, heads: int) -> None:
    """Refuse a text that an encoder has no memory for.

    Raises:
        CapacityError: says what is needed and what is free; never where the system does not say what is free.
    """
    needed, free = attention_bytes(tokens, heads), free_memory()
    if free is not None and needed > free:
        raise CapacityError(
            f"the text has {tokens} tokens, and the encoder needs about {needed / 1e9:.1f} GB of memory for all pairs "
            f"of them; {free / 1e9:.1f} GB are free; shorten the text, or ask for its parts one by one"
        )
