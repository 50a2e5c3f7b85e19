"""What can be told of a base's tokenizer before the base is loaded, and of its ids before it is exported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.base.sentencepiece_file import find_sentencepiece, missing
from edgeprompt.errors import SourceError

_MARIAN = ("source.spm", "target.spm")
_UNREADABLE = ("tekken.json", "tiktoken.model", "tokenizer.tiktoken", "bpe.codes", "prophetnet.tokenizer", "dict.txt")
"""Files of tokenizers of which no `tokenizer.json` is made."""
_NAMED = 5
"""Tokens that a message names."""


def check_tokenizer_files(base: object, given: str | None = None) -> None:
    """Refuse a base whose tokenizer no `tokenizer.json` can be made of; anything but a local folder passes.

    Args:
        base: What to look at.
        given: What the user calls it; None: what `base` says.

    Raises:
        SourceError: Marian's pair of SentencePiece models, which one `tokenizer.json` cannot hold.
        MissingDependencyError: a SentencePiece model alone, and the library that reads it is not installed.
    """
    folder = Path(base).expanduser() if isinstance(base, (str, os.PathLike)) else None
    if folder is None or not folder.is_dir() or (folder / names.TOKENIZER).exists():
        return
    shown = given or str(base)
    if any((folder / name).exists() for name in _MARIAN):
        raise SourceError(
            f"the tokenizer of {shown!r} is two SentencePiece models ({', '.join(_MARIAN)}), and a package needs "
            f"one {names.TOKENIZER}, which transformers makes none of; choose a base that has a {names.TOKENIZER}"
        )
    found = next((name for name in _UNREADABLE if (folder / name).exists()), None)
    if found and not any((folder / name).exists() for name in ("vocab.json", "vocab.txt")):
        raise SourceError(
            f"the tokenizer of {shown!r} is {found}, of which no {names.TOKENIZER} is made here; put the model's "
            f"{names.TOKENIZER} beside it"
        )
    alone = find_sentencepiece(folder)
    if alone and not (_installed("sentencepiece") and _installed("google.protobuf")):
        raise missing(shown, alone)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def check_vocabulary(tokenizer: Any, vocab_size: int, base: str) -> None:
    """Refuse a tokenizer that turns text into ids which the base has no embedding for.

    Such an id would read a row of a soft prompt. Tokens beyond the embedding that no text becomes (padding entries) are
    harmless and pass.

    Args:
        tokenizer: A fast transformers tokenizer.
        vocab_size: Rows of the base's embedding.
        base: What to call the base.

    Raises:
        SourceError: names the tokens and what to do.
    """
    backend = tokenizer.backend_tokenizer
    beyond = {token: index for token, index in backend.get_vocab(with_added_tokens=True).items() if index >= vocab_size}
    texts = {token: (token, backend.decode([index], skip_special_tokens=False)) for token, index in beyond.items()}
    produced = {
        token
        for token, spellings in texts.items()
        for text in spellings
        if beyond[token] in backend.encode(text, add_special_tokens=False).ids
    }
    around = [*backend.encode("a").ids, *backend.encode("a", "b").ids]
    produced |= {token for token, index in beyond.items() if index in around}
    if produced:
        named = sorted(produced, key=beyond.__getitem__)
        shown = ", ".join(f"{token!r} ({beyond[token]})" for token in named[:_NAMED])
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        raise SourceError(
            f"the tokenizer of {base!r} makes ids of text that its {vocab_size} embeddings do not reach: "
            f"{shown}{more}; resize the embeddings (model.resize_token_embeddings(len(tokenizer))) and train them, or "
            "remove the tokens from the tokenizer"
        )
