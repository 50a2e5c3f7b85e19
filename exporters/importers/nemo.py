"""NeMo prompt learning: prompt tables in a `.nemo` archive or a checkpoint."""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprompt.errors import SourceError, UnsupportedError
from exporters.importers.base_weights import EMBEDDING, check_copy
from exporters.importers.configs import MAX_BYTES, check_nemo, read_yaml, yaml_beside
from exporters.importers.foreign import BaseFacts, ForeignPrompt, ReadOptions, as_rows, prompt_name
from exporters.importers.reading import PICKLES, Contents, check_file, read_checkpoint

WEIGHTS = "model_weights.ckpt"
CONFIG = "model_config.yaml"
MAX_ARCHIVE = 4 << 30
MAX_MEMBERS = 10_000

_TASK = re.compile(r"(?:^|\.)prompt_table\.(?!prompt_table\.)(.+?)\.prompt_embeddings\.weight$")
_TABLE = re.compile(r"(?:^|\.)inference_table(?:\.inference_table)?$")
_ENCODER = re.compile(r"(?:^|\.)(?:prompt_encoder|ptuning_adapter)\.")
_WORDS = re.compile(r"^(?!.*prompt).*word_embeddings\.weight$")
_BASE = re.compile(
    r"^(?:frozen_model|language_model|embedding|encoder|decoder|output_layer|word_embeddings|enc_dec_model)"
    r"\.(?!.*(?:adapter|lora|prompt|ia3))"
)


def recognises(source: Path, contents: Contents) -> bool:
    """A `.nemo` archive, or a checkpoint with a prompt table."""
    return source.suffix == ".nemo" or any(
        pattern.search(name) for name in contents.tensors for pattern in (_TASK, _TABLE, _ENCODER)
    )


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """One prompt per task of the table."""
    with _weights(source) as (file, config):
        checkpoint = read_checkpoint(file, lambda name: bool(_TASK.search(name) or _TABLE.search(name)))
        notes = check_copy(
            checkpoint, base, lambda name: EMBEDDING if _WORDS.search(name) else None, "NeMo", padded=True
        )
    tables = checkpoint.tensors
    if not tables and any(map(_ENCODER.search, checkpoint.names)):
        raise UnsupportedError(
            f"{source.name} holds a prompt encoder and no table; let NeMo finish the p-tuning (it then writes the "
            "inference table), and convert that"
        )
    tasks = {match[1]: name for name in tables if (match := _TASK.search(name))}
    if not tasks:
        tasks = {prompt_name(source): name for name in tables}
    if not tasks:
        raise SourceError(f"{source.name} has no prompt_table.<task>.prompt_embeddings.weight and no inference_table")
    if len(tables) > 1 and not any(map(_TASK.search, tables)):
        raise SourceError(f"{source.name} has several tables without a task: {', '.join(sorted(tables))}")
    # The encoder made the table; the base is frozen, and `word_embeddings` a copy of its own.
    replace(checkpoint, file=source).account(lambda name: bool(_ENCODER.search(name) or _BASE.search(name)), "NeMo")
    shapes = {task: tables[name].shape for task, name in tasks.items()}
    templates: Mapping[str, str] = {}
    if config is not None and all(map(len, shapes.values())):
        templates = check_nemo(config[0], shapes, any(map(_TASK.search, tables)), base, config[1])

    def lost(task: str) -> tuple[str, ...]:
        given = f" {templates[task][:200]!r}" if task in templates else ""
        where = f"NeMo's task template{given}, which says where virtual tokens stand: give --template"
        return () if options.template else (f"{where} (default: all in front)",)

    return [
        ForeignPrompt(
            task,
            "p-tuning",
            prompt_embeddings=as_rows(tables[name], name, base),
            source={"format": "nemo", "task": task},
            found=(f"task {task!r}: {list(tables[name].shape)}",),
            dropped=lost(task),
            notes=notes,
        )
        for task, name in tasks.items()
    ]


@contextmanager
def _weights(source: Path) -> Iterator[tuple[Path, tuple[Mapping[str, Any], str] | None]]:
    """The checkpoint's file and its config; from an archive only these are read, and never written to where it says."""
    if source.suffix in (*PICKLES, ".safetensors"):
        yield source, yaml_beside(source, CONFIG) if source.name == WEIGHTS else None
        return
    check_file(source)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / WEIGHTS
        config = None
        try:
            with tarfile.open(source, "r:*") as archive:
                for count, member in enumerate(archive):
                    if count > MAX_MEMBERS or member.offset_data + member.size > MAX_ARCHIVE:
                        raise SourceError(
                            f"{source.name} unpacks to more than {MAX_MEMBERS} members or {MAX_ARCHIVE} bytes, too "
                            "many for a prompt"
                        )
                    if not member.isfile() or Path(member.name).name not in (WEIGHTS, CONFIG):
                        continue
                    content = archive.extractfile(member)
                    if content is not None and Path(member.name).name == CONFIG:
                        where = f"{source.name}:{CONFIG}"
                        if member.size > MAX_BYTES:
                            raise SourceError(f"{where} has {member.size} bytes, too many for a config")
                        config = read_yaml(content.read(), where), where
                        continue
                    with target.open("wb") as file:
                        while content and (piece := content.read(1 << 20)):
                            file.write(piece)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(
                f"{str(source)!r} is no readable .nemo archive: {' '.join(str(error).split())}"
            ) from error
        if not target.exists():
            raise SourceError(f"{source.name} has no {WEIGHTS}; it is no NeMo prompt archive")
        try:
            yield target, config
        except (SourceError, UnsupportedError) as error:  # which name the temporary file
            raise type(error)(str(error).replace(str(target), f"{source}:{WEIGHTS}")) from error
