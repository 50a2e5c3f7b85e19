"""The package's folder: tokenizer, manifest, hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.base.generation import generation_of
from edgeprompt.base.geometry import geometry_of, tokens_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.base.tokenizer_files import check_vocabulary
from edgeprompt.errors import SourceError
from edgeprompt.package.files import fingerprint_tokenizer, sha256_file
from edgeprompt.package.manifest import GraphFile, Manifest, Tokens
from edgeprompt.prompts.file import PromptFile, save_prompt
from exporters.contract import BuiltGraphs, ExportOptions
from exporters.layout import data_files

_TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
_TOKENIZER_FILES = (names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)


def write_tokenizer(
    tokenizer: Any | None, folder: Path, scratch: Path, *, vocab_size: int | None = None, base: str = "the base"
) -> str | None:
    """Write the tokenizer's files into `folder`; returns its fingerprint, None where the base has no tokenizer.

    Raises:
        SourceError: the tokenizer exists in slow form only, or makes ids of text that are not below `vocab_size`
            (None: whatever they are).
    """
    if tokenizer is None:
        return None
    home = scratch / "tokenizer"
    tokenizer.save_pretrained(home)
    if not (home / names.TOKENIZER).exists():
        raise SourceError(
            f"tokenizer {type(tokenizer).__name__} has no {names.TOKENIZER}, and transformers makes none of it; choose "
            f"a base that has a {names.TOKENIZER}"
        )
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, base)
    for name in _TOKENIZER_FILES:
        if (home / name).exists():
            (home / name).replace(folder / name)
    data = json.loads((folder / names.TOKENIZER).read_bytes())
    # Without indentation, and with merges as "a b", a tokenizer takes half the bytes and loads in less time.
    merges = data["model"].get("merges")
    if merges and all(isinstance(merge, list) and " " not in "".join(merge) for merge in merges):
        data["model"]["merges"] = [" ".join(merge) for merge in merges]
    (folder / names.TOKENIZER).write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), "utf-8")
    return fingerprint_tokenizer((folder / names.TOKENIZER).read_bytes())


def hash_tokenizer(folder: Path) -> str | None:
    """SHA-256 of a package's `tokenizer.json`, None where it has none."""
    file = folder / names.TOKENIZER
    return sha256_file(file) if file.exists() else None


@dataclass(frozen=True)
class Said:
    """What a base's configs say of its answers."""

    tokens: Tokens
    generation: dict[str, Any]
    notes: list[str]


def said_of(loaded: LoadedBase) -> Said:
    """Special tokens and `generation_of` of a base.

    Raises:
        SourceError: a token is not in the vocabulary, or a field is not usable.
    """
    written = getattr(loaded.model, "generation_config", None)
    generation, notes = generation_of(loaded.config, written, loaded.family.architecture)
    return Said(tokens_of(loaded.config, written, loaded.tokenizer), generation, notes)


def make_manifest(
    loaded: LoadedBase,
    built: BuiltGraphs,
    options: ExportOptions,
    folder: Path,
    tokenizer_fingerprint: str | None,
    said: Said,
) -> Manifest:
    """Describe the graphs that lie in `folder`."""
    return Manifest(
        architecture=loaded.family.architecture,
        model_type=loaded.config.model_type,
        base=loaded.base,
        geometry=geometry_of(loaded.config),
        tokens=said.tokens,
        precision=options.precision,
        route=built.route,
        graphs=hash_graphs(built.graphs, folder),
        tokenizer_fingerprint=tokenizer_fingerprint,
        tokenizer_sha256=hash_tokenizer(folder),
        prompt_input=options.prompt_input,
        target=options.target,
        kv_dtype=built.kv_dtype,
        pooling=built.pooling,
        kv_in_place=built.kv_in_place,
        generation=said.generation,
        versions=tool_versions(),
        extra={
            **built.extra,
            **({"base_revision": loaded.pinned} if loaded.pinned else {}),
            **({"generation_notes": said.notes} if said.notes else {}),
            **({"block_size": options.block_size} if options.precision == "int4" else {}),
        },
    )


def hash_graphs(graphs: Mapping[str, str], folder: Path) -> dict[str, GraphFile]:
    """Manifest entries of graphs and of the files that hold their external data."""
    entries = {}
    for key, file in graphs.items():
        home = Path(file).parent
        data = [(home / name).as_posix() for name in data_files(folder / file)]
        hashes = {name: sha256_file(folder / name) for name in data}
        entries[key] = GraphFile(file, sha256_file(folder / file), hashes)
    return entries


def write_prompts(prompts: Mapping[str, PromptFile], folder: Path) -> tuple[str, ...]:
    """Put prompt files into the package; returns their relative paths."""
    home = folder / names.PROMPTS_FOLDER
    if prompts:
        home.mkdir()
    for file, prompt in prompts.items():
        save_prompt(prompt, home / file)
    return tuple(f"{names.PROMPTS_FOLDER}/{file}" for file in prompts)


def tool_versions() -> dict[str, str]:
    """Versions of the libraries that made the graph."""
    found = {}
    for tool in ("edgeprompt", *_TOOLS):
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
