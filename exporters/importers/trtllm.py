"""TensorRT-LLM prompt tables: `.npy [tasks, most tokens, hidden_size]`, shorter prompts padded with zero rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeprompt.errors import SourceError
from exporters.importers.foreign import BaseFacts, ForeignPrompt, ReadOptions, as_rows, prompt_name
from exporters.importers.reading import Contents, load_npy


def recognises(source: Path, contents: Contents) -> bool:
    """A `.npy` with three dimensions."""
    return source.suffix == ".npy" and contents.rank == 3


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """One prompt per task, without its padding; a two-dimensional table is one task."""
    table = load_npy(source)
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3:
        raise SourceError(f"{source.name} is {list(table.shape)}; a prompt table is [tasks, tokens, hidden_size]")
    prompts = []
    for task, rows in enumerate(table):
        used = np.flatnonzero(rows.any(axis=1))
        if not used.size:
            raise SourceError(f"task {task} of {source.name} is all zero; no prompt was trained there")
        kept = np.array(rows[: used[-1] + 1])
        padding = len(rows) - len(kept)
        prompts.append(
            ForeignPrompt(
                f"{prompt_name(source)}-{task}" if len(table) > 1 else prompt_name(source),
                "prompt-tuning",
                prompt_embeddings=as_rows(kept, f"task {task}", base),
                source={"format": "trtllm", "task": task},
                found=(f"task {task}: {len(kept)} tokens",),
                dropped=(f"task {task}: {padding} zero rows of padding",) if padding else (),
            )
        )
    return prompts
