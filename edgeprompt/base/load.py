"""A base model from a hub id, a local folder or a GGUF file, in float32."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.base.families import find_family
from edgeprompt.base.fingerprint import base_fingerprint
from edgeprompt.errors import SourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model in PyTorch, ready to export or to compare with."""

    name: str
    """What people call it: the hub id, the folder's or the GGUF file's name."""
    model: Any
    """A transformers model in float32, in evaluation mode, without gradients."""
    tokenizer: Any | None
    """A transformers tokenizer, None where the base has none."""
    family: Any
    """Its entry in `edgeprompt.base.families`."""

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def fingerprint(self) -> str:
        """The base fingerprint (`edgeprompt.base.fingerprint`)."""
        return base_fingerprint(self.model)


def load_base(base: str | os.PathLike[str]) -> LoadedBase:
    """Load BASE: a Hugging Face id, a local folder, or a `.gguf` file.

    Raises:
        SourceError: nothing is there, it cannot be read, or its architecture is not known.
    """
    source, options = _locate(str(base))
    with _gguf_read_once() if options else contextlib.nullcontext():
        return _load(str(base), source, options)


def _load(base: str, source: str, options: dict[str, str]) -> LoadedBase:
    family = find_family(_read_config(base, source, options).model_type)
    model = _read_model(base, source, options, family)
    if options:
        model = _without_gguf(model)
    model.requires_grad_(False)
    return LoadedBase(_base_name(base), model.eval(), _read_tokenizer(source, options), family)


def _locate(base: str) -> tuple[str, dict[str, str]]:
    """What transformers calls pretrained_model_name_or_path, and gguf_file where it is one."""
    path = Path(base).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"base {base!r} is a file; give a model folder, a .gguf file or a Hugging Face id")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").exists():
            if (path / "adapter_config.json").exists():
                raise SourceError(
                    f"{base!r} is a PEFT adapter, no base model: export the base it names and convert the adapter "
                    "with edgeprompt convert"
                )
            raise SourceError(f"folder {base!r} has no config.json, so it is no transformers model")
        return str(path), {}
    looks_local = base.startswith((".", "/", "~")) or base.endswith(".gguf") or not _HUB_ID.fullmatch(base)
    if looks_local:
        raise SourceError(f"no base model at {base!r}; give a model folder, a .gguf file or a Hugging Face id")
    return base, {}


def _read_config(base: str, source: str, options: dict[str, str]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, IndexError, struct.error) as error:  # the last two: a GGUF cut short
        if options or Path(source).is_dir():
            raise SourceError(f"cannot read the config of {base!r}: {_one_line(error)}") from error
        raise SourceError(
            f"no base model {base!r}: no such folder, and Hugging Face gave none ({_one_line(error)}); "
            "give a model folder, a .gguf file or a Hugging Face id"
        ) from error


def _read_model(base: str, source: str, options: dict[str, str], family: Any) -> Any:
    import torch
    import transformers

    from edgeprompt.base.encoder import read_encoder

    auto = {
        names.DECODER_ONLY: transformers.AutoModelForCausalLM,
        names.ENCODER_DECODER: transformers.AutoModelForSeq2SeqLM,
    }.get(family.architecture)
    try:
        if auto is None:
            return read_encoder(source, options)
        return auto.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SourceError(f"cannot load the base model {base!r}: {_one_line(error)}") from error


def _read_tokenizer(source: str, options: dict[str, str]) -> Any | None:
    from transformers import AutoTokenizer

    if not options and Path(source).is_dir() and not _has_tokenizer(Path(source)):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(f"cannot load the tokenizer of {source!r}: {_one_line(error)}") from error


def _has_tokenizer(folder: Path) -> bool:
    # Without any of these, transformers would make up an empty tokenizer for some model types.
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
    return any((folder / name).exists() for name in known)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Parse a GGUF file once: transformers does it for the config, the tokenizer and the weights, seconds each time."""
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.cache(function) for function in before)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


def _without_gguf(model: Any) -> Any:
    """The same model as an ordinary one: GGUF loading leaves a quantization_config that refuses saving."""
    from transformers import initialization

    config = type(model.config)(
        **{key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    config.architectures = [type(model).__name__]
    with initialization.no_init_weights():
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _base_name(base: str) -> str:
    path = Path(base).expanduser()
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else base


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
