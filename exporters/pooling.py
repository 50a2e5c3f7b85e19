"""What sentence-transformers noted beside a base about its embeddings, and what of it `embed` does without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprompt.base.accounting import tell
from edgeprompt.base.load import LoadedBase
from edgeprompt.base.source import read_json
from edgeprompt.errors import SourceError
from edgeprompt.package import strict_json
from edgeprompt.package.files import read_regular

MODULES = "modules.json"
_MAX_BYTES = 1 << 20
_MODES = {"cls": "cls", "cls_token": "cls", "lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
"""Its name for a pooling -> ours."""
_DONE = ("Transformer", "Pooling", "Normalize")


def pooling_of(loaded: LoadedBase) -> str:
    """The pooling that is noted beside an encoder, else "mean"; what `embed` does without is told.

    Raises:
        SourceError: a file of it cannot be read.
    """
    pooling, without = read_pooling(Path(getattr(loaded.config, "_name_or_path", "") or "."))
    if without:
        tell(
            f"sentence-transformers does more with {loaded.name!r} than embeddings here, which so are others: "
            f"{'; '.join(without)}"
        )
    return pooling


def read_pooling(folder: Path) -> tuple[str, list[str]]:
    """The pooling of a base's folder, and what sentence-transformers does besides that `embed` does not.

    Raises:
        SourceError: a file of it cannot be read.
    """
    if not (folder / MODULES).is_file() and any(path == folder.name for _, path in _modules(folder.parent)):
        folder = folder.parent  # its older folders have the base in one beside the pooling
    place, others = "1_Pooling", []
    for kind, path in _modules(folder):
        if kind == "Pooling":
            place = path
        elif kind not in _DONE:
            others.append(kind)
    notes = [f"a layer {kind!r} behind the base" for kind in others]
    file = folder / place / "config.json"
    found = "mean"
    if file.is_file():
        modes = _modes_of(read_json(file))
        if len(modes) == 1 and modes[0] in _MODES:
            found = _MODES[modes[0]]
        elif modes:
            notes.append(f"pooling {' and '.join(modes)} (the mean is taken)")
    if _optional(folder / "sentence_bert_config.json").get("do_lower_case") is True:
        notes.append("texts in small letters (do_lower_case)")
    settings = _optional(folder / "config_sentence_transformers.json")
    prompts, name = settings.get("prompts"), settings.get("default_prompt_name")
    text = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
    if text:
        notes.append(f"{text!r} in front of each text (default_prompt_name)")
    return found, notes


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """(kind, folder) of each step behind the text."""
    file = folder / MODULES
    if not file.is_file():
        return
    try:
        steps = strict_json.loads(read_regular(file, _MAX_BYTES).decode())
        for step in steps:
            yield str(step["type"]).rpartition(".")[2], str(step["path"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(f"{str(file)!r} is no list of modules of sentence-transformers; download it again") from error


def _modes_of(noted: Mapping[str, Any]) -> list[str]:
    """The poolings that are on, by their names there."""
    modes = noted.get("pooling_mode")
    if modes is not None:
        return [modes] if isinstance(modes, str) else [str(mode) for mode in modes]
    return [name.removeprefix("pooling_mode_") for name, on in noted.items() if on is True and "pooling_mode_" in name]


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
