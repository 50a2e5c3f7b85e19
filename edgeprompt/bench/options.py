"""What to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SYNTHETIC_TOKENS = 16
"""Virtual tokens of the random prompt that is measured where there is no other."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. Everything inside a process is measured for each provider and number of threads.

    Cold start and memory are measured for the first of each.
    """

    prompts: tuple[Path, ...] = ()
    """Prompt files, measured one after another; none: those of the package, else one of random rows, whose latency
    is that of a trained one."""
    input_tokens: tuple[int, ...] = (32, 128)
    """Tokens of the text."""
    new_tokens: int = 64
    batch: tuple[int, ...] = (1, 4)
    """Rows of one call."""
    tasks: tuple[int, ...] = (1, 10, 100, 1000)
    """Prompts loaded at once, for memory."""
    threads: tuple[int | None, ...] = (None,)
    """None: ONNX Runtime's choice, one per physical core."""
    providers: tuple[str, ...] = ("auto",)
    repetitions: int = 5
    warmup: int = 1
