"""Readers of other tools' prompts: one file per format, one line here."""

from __future__ import annotations

import contextlib
from importlib import import_module
from pathlib import Path
from typing import cast

from edgeprompt.errors import InputError, MissingDependencyError, SourceError, UnsupportedError
from exporters.importers.foreign import BaseFacts, ForeignPrompt, Importer, ReadOptions
from exporters.importers.reading import peek

FORMATS = ("peft", "tgis", "nemo", "openprompt", "p-tuning-v2", "trtllm", "t5x", "vllm")
"""In the order in which auto-detection asks: the unmistakable first, bare tensors last."""


def find_importer(source_format: str) -> Importer:
    """The reader of a format.

    Raises:
        InputError: no such format.
    """
    if source_format not in FORMATS:
        raise InputError(f"format {source_format!r} is not one of auto, {', '.join(FORMATS)}")
    return cast(Importer, import_module(f"exporters.importers.{source_format.replace('-', '_')}"))


def detect_format(source: Path) -> str:
    """The first format that recognises `source`.

    Raises:
        SourceError: nothing is there, it is broken, or no format recognises it.
        UnsupportedError: a pickle that holds more than tensors.
    """
    contents = peek(source)
    for name in FORMATS:
        if find_importer(name).recognises(source, contents):
            return name
    inside = _prompts_inside(source) if source.is_dir() else []
    if inside:
        raise SourceError(
            f"{str(source)!r} holds no prompt itself; its folders do: {', '.join(inside)}; give one of them"
        )
    raise SourceError(
        f"{str(source)!r} is in no known prompt format; name it with --from if it is one of {', '.join(FORMATS)}"
    )


def _prompts_inside(folder: Path) -> list[str]:
    """Folders of a training's output that hold a prompt (`checkpoint-500`), at most four."""
    found = []
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        with contextlib.suppress(SourceError, UnsupportedError, MissingDependencyError, OSError):
            contents = peek(child)
            if any(find_importer(name).recognises(child, contents) for name in FORMATS):
                found.append(child.name)
    return found[:4]


def read_foreign(
    source: Path, source_format: str, base: BaseFacts | None, options: ReadOptions
) -> tuple[str, list[ForeignPrompt]]:
    """The format and every prompt in `source`; see `Importer.read` for what it raises."""
    found = detect_format(source) if source_format == "auto" else source_format
    importer = find_importer(found)
    if not source.exists():
        raise SourceError(f"nothing is at {str(source)!r}; give a prompt's file or folder")
    return found, importer.read(source, base, options)
