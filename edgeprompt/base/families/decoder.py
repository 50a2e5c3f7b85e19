"""What the decoder exporters must know about a family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from edgeprompt import names
from edgeprompt.base.families import Family


def _no_patch(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class DecoderFamily(Family):
    """A decoder-only family."""

    architecture: str = names.DECODER_ONLY
    genai: bool = False
    """Whether the onnxruntime-genai builder writes this family."""
    fused_rotary: bool = False
    """Whether the whole head is rotated in halves by its modeling file's `apply_rotary_pos_emb`, with cos and sin
    from a `rotary_emb` module: then GroupQueryAttention rotates inside the operator."""
    patch: Callable[[Any], AbstractContextManager[None]] = _no_patch
    """For attention code that does not go through transformers' AttentionInterface: puts ours in, and restores."""
