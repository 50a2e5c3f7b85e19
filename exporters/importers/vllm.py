"""vLLM and transformers `prompt_embeds`: a `.pt` file with one tensor [tokens, hidden_size]."""

from __future__ import annotations

from pathlib import Path

from edgeprompt.errors import SourceError
from exporters.importers.foreign import BaseFacts, ForeignPrompt, ReadOptions, as_rows, prompt_name
from exporters.importers.reading import PICKLES, Contents, as_array, load_pickle


def recognises(source: Path, contents: Contents) -> bool:
    """A PyTorch file with a bare tensor."""
    return source.suffix in PICKLES and contents.rank in (2, 3)


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """The tensor as virtual tokens in front of the text; a leading batch dimension of one is removed."""
    tensor = load_pickle(source)
    if not hasattr(tensor, "layout"):
        raise SourceError(f"{source.name} holds a {type(tensor).__name__}; prompt_embeds are one tensor")
    rows = as_array(tensor, source.name)
    if rows.ndim == 3 and len(rows) == 1:
        rows = rows[0]
    return [
        ForeignPrompt(
            prompt_name(source),
            "prompt-tuning",
            prompt_embeddings=as_rows(rows, source.name, base),
            source={"format": "vllm"},
            found=(f"prompt_embeds {list(rows.shape)}; they may hold embedded text too, which stays in front",),
        )
    ]
