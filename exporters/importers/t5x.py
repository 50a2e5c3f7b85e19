"""google-research/prompt-tuning (T5X): one prompt as a bare `.npy [tokens, hidden_size]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporters.importers.foreign import BaseFacts, ForeignPrompt, ReadOptions, as_rows, prompt_name
from exporters.importers.reading import Contents, load_npy


def recognises(source: Path, contents: Contents) -> bool:
    """A `.npy` with two dimensions."""
    return source.suffix == ".npy" and contents.rank == 2


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """The prompt, in float32: rows of norm 1000 and more are usual, and sums of float16 would overflow."""
    rows = as_rows(load_npy(source), source.name, base).astype(np.float32)
    return [
        ForeignPrompt(
            prompt_name(source),
            "prompt-tuning",
            prompt_embeddings=rows,
            source={"format": "t5x"},
            found=(f"a bare table {list(rows.shape)}, largest row norm {np.linalg.norm(rows, axis=1).max():.4g}",),
        )
    ]
