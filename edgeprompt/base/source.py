"""Where a base model lies: which folder or GGUF files, and what is wrong with what was given."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprompt.errors import SourceError
from edgeprompt.package import hub, strict_json
from edgeprompt.package.files import check_regular, open_regular, read_regular

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of unsharded weights, in the order in which transformers looks for them."""
_MAX_JSON = 256 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "source.spm",
    "sentencepiece.bpe.model", "sentencepiece.model", "spm_char.model", "bpe.codes", "tekken.json", "tiktoken.model",
    "tokenizer.tiktoken", "prophetnet.tokenizer", "dict.txt",
)  # fmt: skip
"""Without any of these a model has no tokenizer, though transformers would make up an empty one for some types."""
_HUB_FILES = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "target.spm",
    "normalizer.json", "chat_template.jinja", "generation_config.json", "modules.json", "1_Pooling/config.json",
    "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A base model on disk."""

    given: str
    """What the user typed."""
    folder: Path
    """The folder of config, tokenizer and weights; of a GGUF file, the folder that it lies in."""
    gguf: tuple[Path, ...] = ()
    """The GGUF file, or all parts of a split one in their order."""
    hub: bool = False
    """Whether it was downloaded from Hugging Face."""
    pinned: str | None = None
    """`user/repo@commit` of what came from Hugging Face."""

    @property
    def name(self) -> str:
        """What people call it: the hub id, the folder's or the GGUF file's name."""
        if self.gguf:
            found = _PART.fullmatch(self.gguf[0].name)
            return found["stem"] if found else self.gguf[0].stem
        if self.hub:
            return self.given if self.pinned is None else self.pinned.partition("@")[0]
        return self.folder.resolve().name


def find_source(base: str | os.PathLike[str]) -> Source:
    """Find a folder, a `.gguf` file (any part of a split one), or a Hugging Face id (`user/repo[@revision][/file]`).

    Raises:
        SourceError: nothing is there, or nothing that is a base model; the message says what is there instead.
    """
    local = find_local(base)
    if local is not None:
        return local
    wanted = hub.parse(base)
    if wanted is None:  # an id without a user: "gpt2"
        return Source(str(base), _download(str(base)), hub=True)
    if wanted.file is not None and wanted.file.endswith(".gguf"):
        names = _part_names(wanted.file)
        found = hub.fetch(wanted, wanted.file, lambda _: ((name, True) for name in names), what="base model")
        path = found.folder / wanted.file
        return Source(wanted.given, path.parent, _parts(path), pinned=found.pinned)
    inside = "" if wanted.file is None else f"{wanted.file}/"
    found = hub.fetch(wanted, f"{inside}{CONFIG}", lambda config: _base_files(config.parent, inside), what="base model")
    return Source(wanted.given, found.folder / inside, hub=True, pinned=found.pinned)


def find_local(base: str | os.PathLike[str]) -> Source | None:
    """Find a local folder or a `.gguf` file; None for what can be a Hugging Face id. Imports and loads nothing.

    Raises:
        SourceError: as `find_source`.
    """
    given = str(base)
    path = Path(given).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"base {given!r} is a file; give a model folder, a .gguf file or a Hugging Face id")
        return Source(given, path.parent, _parts(path))
    if path.is_dir():
        _check_folder(given, path)
        _check_kinds(path)
        return Source(given, path)
    if path.exists():
        raise SourceError(
            f"base {given!r} is a pipe or a device; give a model folder, a .gguf file or a Hugging Face id"
        )
    there = hub.parse(given)
    on_hub = there is not None or _HUB_ID.fullmatch(given) is not None
    if given.endswith(".gguf"):
        on_hub = there is not None and there.file is not None
    looks_local = given.startswith((".", "/", "~")) or not on_hub
    if looks_local:
        raise SourceError(f"no base model at {given!r}; give a model folder, a .gguf file or a Hugging Face id")
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a base.

    Raises:
        SourceError: no such file, a Git LFS pointer, no JSON object, or a key twice with two values.
    """
    check_contents(path)
    try:
        data = json.loads(
            read_regular(path, _MAX_JSON).decode("utf-8"),
            object_pairs_hook=strict_json.consistent,
            parse_int=strict_json.integer,
        )
    except OSError as error:
        raise SourceError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except RecursionError as error:
        raise SourceError(f"cannot read {str(path)!r}: it is nested too deeply") from error
    except ValueError as error:
        raise SourceError(f"cannot read {str(path)!r}: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{str(path)!r} holds {type(data).__name__}, a JSON object is needed")
    return data


def check_contents(path: Path) -> None:
    """Refuse a file that is empty, or that a clone without Git LFS left in another's place.

    Raises:
        SourceError: says what to do.
    """
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise SourceError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if not start:
        raise SourceError(f"{str(path)!r} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise SourceError(
            f"{str(path)!r} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull, or download the "
            "model with: hf download"
        )


def check_config(given: str, config: Mapping[str, Any], known: bool) -> None:
    """Refuse configs of models that cannot be taken as they are.

    Args:
        given: What the user typed.
        config: The contents of config.json.
        known: Whether transformers has the model type itself.

    Raises:
        SourceError: a quantised checkpoint, or a model whose code comes with it.
    """
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise SourceError(
            f"the weights of {given!r} are quantised already ({method}), and edgeprompt quantises by itself: give the "
            "float checkpoint that they were made from, or a .gguf file"
        )
    if config.get("auto_map") and not known:
        raise SourceError(
            f"model type {config.get('model_type')!r} of {given!r} needs code that comes with the model (auto_map), "
            "and edgeprompt runs no code from a model's folder; give a base of a type that transformers has itself"
        )


def one_line(error: BaseException) -> str:
    """An exception's message as one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_folder(given: str, path: Path) -> None:
    if (path / CONFIG).exists():
        return
    if (path / ADAPTER).exists():
        raise SourceError(
            f"{given!r} is a PEFT adapter, no base model: export the base it names and convert the adapter "
            "with edgeprompt convert"
        )
    missing = f"folder {given!r} has no {CONFIG}, so it is no transformers model"
    inside = sorted(child.name for child in path.iterdir() if (child / CONFIG).is_file())
    if inside:
        raise SourceError(f"{missing}; models lie in its folders {_some(inside)}: give one of those")
    files = sorted(file.name for file in path.glob("*.gguf"))
    if files:
        raise SourceError(f"{missing}; give its GGUF file: {_some(files)}")
    raise SourceError(missing)


def _check_kinds(folder: Path) -> None:
    """Refuse pipes and devices among the files that libraries open: they would be waited for, or read for ever.

    Raises:
        SourceError: names the file.
    """
    for name in (CONFIG, *_HUB_FILES, *WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)):
        file = folder / name
        if file.exists() and not file.is_file():
            try:
                check_regular(file)
            except OSError as error:
                raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error


def _part_names(file: str) -> list[str]:
    """All parts of a GGUF file in a repository."""
    home, _, name = file.rpartition("/")
    found = _PART.fullmatch(name)
    if found is None:
        return [file]
    count, before = int(found["count"]), f"{home}/" if home else ""
    return [f"{before}{found['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _parts(path: Path) -> tuple[Path, ...]:
    """All parts of a split GGUF file, or the file alone.

    Raises:
        SourceError: some are not there.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        return (path,)
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise SourceError(
            f"{path.name!r} is one of {count} parts of a split GGUF file, and {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it; download all parts into one folder"
        )
    return tuple(parts)


def _base_files(folder: Path, inside: str) -> Iterator[tuple[str, bool]]:
    """What belongs to a transformers model: as each comes, it tells what comes next."""
    for optional in _HUB_FILES:
        yield f"{inside}{optional}", False
    for weights in WEIGHTS:
        index = f"{weights}.index.json"
        yield f"{inside}{weights}", False
        if (folder / weights).exists():
            return
        yield f"{inside}{index}", False
        if (folder / index).exists():
            for shard in sorted(set(read_json(folder / index).get("weight_map", {}).values())):
                yield f"{inside}{shard}", True
            return


def _download(name: str) -> Path:
    """The snapshot folder of a Hugging Face id, with config and weights in it (from the cache where they are there)."""
    from transformers.utils import cached_file

    def fetch(file: str, needed: bool = True) -> Path | None:
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=needed, _raise_exceptions_for_connection_errors=needed
        )
        return Path(found) if found is not None else None

    try:
        config = fetch(CONFIG)
        assert config is not None
        for optional in _HUB_FILES:
            fetch(optional, needed=False)
        for weights in WEIGHTS:
            if fetch(weights, needed=False) is not None:
                break
            index = fetch(f"{weights}.index.json", needed=False)
            if index is not None:
                for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                    fetch(shard)
                break
    except (OSError, ValueError) as error:
        raise SourceError(
            f"no base model {name!r}: no such folder, and Hugging Face gave none ({one_line(error)}); "
            "give a model folder, a .gguf file or a Hugging Face id"
        ) from error
    return config.parent


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
