"""What importers hand over, and what they are told about the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, SourceError
from edgeprompt.package.manifest import Base, Geometry
from edgeprompt.prompts.file import Head
from edgeprompt.prompts.template import Template
from exporters.importers.reading import Contents

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BaseFacts:
    """What an importer may know of the base model that a prompt is for."""

    base: Base
    architecture: str
    model_type: str
    geometry: Geometry
    tokenizer_fingerprint: str | None = None
    tokenizer: Any = None
    """A transformers or an edgeprompt tokenizer; None where the base has none."""
    config: Any = None
    """The transformers config; None where the facts come from a package."""
    embeddings: Callable[[], tuple[Array, Array | None]] | None = None
    """Gives the float32 input and output embeddings [rows, width]; None where the facts come from a package."""
    weights: Callable[[], Mapping[str, Any]] | None = None
    """Gives the model's torch tensors by name; None where the facts come from a package."""
    prefix: str = ""
    """The attribute that models with a head keep the base under (`bert`, `transformer`, `model`)."""


@dataclass(frozen=True)
class ForeignPrompt:
    """One prompt of a foreign file, in the layout of the prompt file."""

    name: str
    method: str
    task: str = "generate"
    prompt_embeddings: Array | None = None
    past_key_values: Array | None = None
    encoder_past_key_values: Array | None = None
    head: Mapping[str, Array] = field(default_factory=dict)
    head_spec: Head | None = None
    template: Template | None = None
    add_special_tokens: bool = True
    verbalizer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    verbalizer_aggregation: str = "sum"
    """How the tool joins several words of one label, whether the file or the user names them."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    base_name: str | None = None
    """The base as the foreign file names it."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Facts that the way back needs; kept under `training.source`."""
    found: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    """What was left out, each with the reason."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadOptions:
    """What the user knows and the file does not say."""

    template: str | None = None
    """As the user wrote it; formats with a template language of their own read that too."""
    labels: tuple[str, ...] = ()
    words: bool = False
    """Whether the user names the label words, so that the file's own are not needed."""


class Importer(Protocol):
    """A module of this folder."""

    def recognises(self, source: Path, contents: Contents) -> bool:
        """Whether `source` looks like this format."""

    def read(self, source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
        """Every prompt in `source`.

        Raises:
            SourceError: broken, hostile, or not this format.
            UnsupportedError: this format, and something that a soft prompt cannot express.
            BaseMismatchError: it does not fit the base.
        """


class NeedsBaseError(SourceError):
    """What a file says cannot be read without its base."""


def need_base(base: BaseFacts | None, kind: str, why: str) -> BaseFacts:
    """`base`, or an error that says what it is needed for.

    Raises:
        SourceError: there is none.
    """
    if base is None:
        raise NeedsBaseError(f"{kind} needs --base: {why}")
    return base


def as_rows(tensor: Array, name: str, base: BaseFacts | None) -> Array:
    """Check prompt embeddings [num_virtual_tokens, hidden_size].

    Raises:
        SourceError: not two-dimensional, or no floats.
        BaseMismatchError: another hidden size than the base's.
    """
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise SourceError(f"{name} has shape {list(tensor.shape)}; prompt embeddings are [tokens, hidden_size]")
    _check_floats(tensor, name)
    width = base.geometry.embedding_size or base.geometry.hidden_size if base else tensor.shape[1]
    if base and tensor.shape[1] != width:
        raise BaseMismatchError(
            f"{name} is {list(tensor.shape)}: {tensor.shape[1]} values a token, base {base.base.name} has {width}"
        )
    return tensor


def as_prefix(
    tensor: Array, name: str, layers: int, heads: int, base: BaseFacts | None, encoder: bool = False
) -> Array:
    """View a flat prefix [tokens, layers * 2 * heads * size] as [layers, 2, heads, tokens, size].

    Every tool that stores prefixes flat (PEFT, OpenPrompt, P-Tuning v2) has this order within a row.

    Raises:
        SourceError: the row does not divide into layers and heads, or holds no floats.
        BaseMismatchError: other sizes than the base's.
    """
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise SourceError(
            f"{name} has shape {list(tensor.shape)}; a prefix is [tokens, layers * 2 * heads * head_size]"
        )
    _check_floats(tensor, name)
    if layers < 1 or heads < 1 or tensor.shape[1] % (layers * 2 * heads):
        raise SourceError(
            f"{name} has rows of {tensor.shape[1]} values, not divisible into {layers} layers x 2 x {heads} heads"
        )
    size = tensor.shape[1] // (layers * 2 * heads)
    if base:
        sizes = base.geometry
        expected = (
            sizes.num_encoder_layers if encoder else sizes.num_layers,
            sizes.num_key_value_heads,
            sizes.head_size,
        )
        if (layers, heads, size) != expected:
            raise BaseMismatchError(
                f"{name} holds {layers} layers, {heads} key-value heads of size {size}; base {base.base.name} has "
                f"{expected[0]} layers, {expected[1]} key-value heads of size {expected[2]}"
            )
    shaped = tensor.reshape(tensor.shape[0], layers, 2, heads, size)
    return np.ascontiguousarray(shaped.transpose(1, 2, 3, 0, 4))


def _check_floats(tensor: Array, name: str) -> None:
    if tensor.dtype.kind != "f":
        raise SourceError(f"{name} holds {tensor.dtype}, token ids or quantised values perhaps; floats are needed")


def prefix_sizes(base: BaseFacts, encoder: bool = False) -> tuple[int, int]:
    """(layers, key-value heads) of the base."""
    sizes = base.geometry
    return (sizes.num_encoder_layers if encoder else sizes.num_layers), sizes.num_key_value_heads


def prompt_name(source: Path) -> str:
    """A prompt's name from where it lies."""
    resolved = source.resolve()
    return resolved.name if resolved.is_dir() else resolved.name.split(".")[0] or names.PROMPT_EMBEDDINGS
