"""A corpus of damaged checkpoints: each module here holds `CASES` for one kind of source.

A case writes one checkpoint with one fault. Whatever loads it must refuse it with one clear line, or load the right
weights and say what was done. `bases.py` has the base models; adapters and foreign formats have their own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Damage:
    """One damaged checkpoint."""

    make: Callable[[Path], Path]
    """Writes it into an empty folder; returns the path that a command is given."""
    says: str
    """Pattern of the one line: the error, or the note where it loads all the same."""
    loads: bool = False
    """Whether it loads, with a note and the right weights, instead of being refused."""
