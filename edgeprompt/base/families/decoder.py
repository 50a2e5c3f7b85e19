"""What the decoder exporters must know about a family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from edgeprompt import names
from edgeprompt.base.families import Family

Patch = Callable[[Any], AbstractContextManager[None]]
"""Takes a model; its attention is replaced while the context lasts."""


def _no_patch(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


def replacing(
    class_name: str, method: str, function: Callable[..., Any]
) -> Callable[[Any], AbstractContextManager[None]]:
    """A family's `patch`: `function` is `method` of every module of the class, until the context ends."""

    @contextmanager
    def patch(model: Any) -> Iterator[None]:
        modules = [module for module in model.modules() if type(module).__name__ == class_name]
        for module in modules:
            setattr(module, method, function.__get__(module))
        try:
            yield
        finally:
            for module in modules:
                delattr(module, method)

    return patch


@dataclass(frozen=True)
class DecoderFamily(Family):
    """A decoder-only family."""

    architecture: str = names.DECODER_ONLY
    genai: bool = False
    """Whether the onnxruntime-genai builder writes this family."""
    fused_rotary: bool = False
    """Whether the whole head is rotated in halves by its modeling file's `apply_rotary_pos_emb`, with cos and sin
    from a `rotary_emb` module: then GroupQueryAttention rotates inside the operator."""
    patch: Patch = _no_patch
    """For attention code that does not go through transformers' AttentionInterface: puts ours in, and restores."""
