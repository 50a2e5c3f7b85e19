"""What a command may write to: the one rule about replacing what lies at an output path.

A `Kind` says what an output is, and recognises an older one. Nothing else is ever replaced: no source of the command,
no folder that holds one, no working directory, no home folder, no git checkout, no file or folder of somebody else.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.errors import InputError, OutputError

_HEAD = 1 << 16
_UNTOLD = "nothing in it tells that edgeprompt wrote it"
_HEADER = 8 << 20
"""Most bytes of a safetensors header or a manifest that are read to recognise it."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADAPTER_KEYS = {
    "base_model_name_or_path", "inference_mode", "modules_to_save", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "num_virtual_tokens", "peft_type", "task_type", "token_dim",
}  # fmt: skip
"""Keys of the adapter configs that `convert` wrote before adapters carried our mark; PEFT writes many more."""
HUB_GRAPH = "hub_graph"
"""Key of the manifest's `extra`: file and hash of the graph for transformers.js."""
_PACKAGE_FILES = {
    names.MANIFEST, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE, "genai_config.json", "config.json",
    "generation_config.json",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of output: what it is called, and how an older one is recognised."""

    name: str
    stranger: Callable[[Path], str | None]
    """What shows that a path holds something else ("it has no edgeprompt.json"); None where it is one of ours."""
    folder: bool = False
    adds: bool = False
    """The folder is added to, and its other files stay."""
    loosely: Callable[[Path], str | None] | None = None
    """Of files whose content does not tell surely who wrote them: as `stranger`, what `force` replaces besides. None
    inside a source is replaced."""


def _package(path: Path) -> str | None:
    try:
        data = json.loads(_read(path / names.MANIFEST, _HEADER))
        if data["format"] != "edgeprompt-package":
            return f"its {names.MANIFEST} is not of a package"
        files = {*data.get("prompts", ())}
        for graph in data["graphs"].values():
            files |= {graph["file"], *graph.get("data", {})}
        if HUB_GRAPH in data.get("extra", {}):
            files.add(data["extra"][HUB_GRAPH]["file"])
    except FileNotFoundError:
        return f"it has no {names.MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"its {names.MANIFEST} cannot be read"
    return _other_files(path, _PACKAGE_FILES | files, "a package's")


def _adapter(path: Path) -> str | None:
    try:
        config = json.loads(_read(path / _ADAPTER_FILES[0], _HEADER))
        writer = _safetensors_metadata(path / _ADAPTER_FILES[1]).get(names.WRITTEN_BY)
        if writer != "edgeprompt" and not set(config) <= _ADAPTER_KEYS:
            return "another tool wrote the adapter in it"
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except (OSError, ValueError, TypeError, RecursionError):
        return "the adapter in it cannot be read"
    return _other_files(path, set(_ADAPTER_FILES), "an adapter's")


def _other_files(folder: Path, known: set[str], whose: str) -> str | None:
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            relative = (Path(place) / name).relative_to(folder).as_posix()
            if relative not in known:
                return f"it holds {relative!r}, which is none of {whose} files"
    return None


def _packed_graph(path: Path) -> str | None:
    return _other_files(path, {"graph.onnx", "graph.onnx.data", "sizes.json", "packed"}, "a packed graph's")


def _safetensors_metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) if size <= _HEADER else {}
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return metadata if isinstance(metadata, dict) else {}


def _marked_safetensors(*keys: str) -> Callable[[Path], str | None]:
    def stranger(path: Path) -> str | None:
        try:
            found = _safetensors_metadata(path)
        except (ValueError, TypeError, RecursionError):
            found = {}
        return None if found.keys() & set(keys) else "it is another file"

    return stranger


def _begins(prefix: bytes, at: int = 0) -> Callable[[Path], str | None]:
    return lambda path: None if _read(path, _HEAD)[at:].startswith(prefix) else "it is another file"


def _text(path: Path) -> str | None:
    return "it is no text" if b"\0" in _read(path, _HEAD) else None


def _answers(path: Path) -> str | None:
    try:
        known = json.loads(_read(path, _HEAD).partition(b"\n")[0])["format"] == names.ANSWERS_FORMAT
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    return None if known else "it is another file"


def _metrics(path: Path) -> str | None:
    try:
        known = {"step", "time"} <= set(json.loads(_read(path, _HEAD).partition(b"\n")[0]))
    except (ValueError, TypeError, RecursionError):
        known = False
    return None if known else "it is another file"


def _run_answers(path: Path) -> str | None:
    """Answers of `run`: JSON lines, or a table with its columns; plain lines of text could be anybody's."""
    line = _read(path, _HEAD).partition(b"\n")[0]
    try:
        found = json.loads(line)
        known = isinstance(found, dict) and {"input", "prompt"} <= found.keys()
    except (ValueError, RecursionError):
        separator = b"\t" if b"\t" in line else b","
        known = {b"prompt", b"answer", b"score"} <= {*line.strip().split(separator)}
    return None if known else _UNTOLD


def _run_parquet(path: Path) -> str | None:
    if (reason := _begins(b"PAR1")(path)) is not None:
        return reason
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-min(path.stat().st_size, 8 + min(length, _HEADER)), os.SEEK_END)
        columns = file.read()
    return None if all(name in columns for name in (b"prompt", b"answer", b"score")) else _UNTOLD


def _report(path: Path) -> str | None:
    head = _read(path, _HEAD)
    known = b"edgeprompt bench" in head or (b"edgeprompt" in head and b"test_time" in head)
    return None if known else "it is no report of edgeprompt bench"


def _journal(path: Path) -> str | None:
    try:
        known = {"records", "bytes", "header", "settings"} == set(json.loads(_read(path, _HEADER)))
    except (ValueError, TypeError, RecursionError):
        known = False
    return None if known else "it is another file"


def _untold(path: Path) -> str | None:
    return _UNTOLD


def _anything(path: Path) -> str | None:
    return None


def _read(path: Path, most: int) -> bytes:
    if not path.is_file():  # a pipe would wait for ever
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with path.open("rb") as file:
        return file.read(most)


PACKAGE = Kind("package", _package, folder=True)
ADAPTER = Kind("PEFT adapter", _adapter, folder=True)
PACKED_GRAPH = Kind("packed graph", _packed_graph, folder=True)
PROMPT_SET = Kind("prompt set", _anything, folder=True, adds=True)
LOG = Kind("log", _anything, folder=True, adds=True)
PROMPT = Kind("prompt file", _marked_safetensors(names.PROMPT_METADATA))
PREFIX = Kind("cached prefix", _marked_safetensors("key", "sha256"))
SESSION = Kind("session", _marked_safetensors(names.SESSION_METADATA))
KV = Kind("prompt as keys and values", _marked_safetensors(names.KV_METADATA))
ONNX_ADAPTER = Kind("ONNX Runtime adapter", _untold, loosely=_begins(b"TORT", 4))
TABLE = Kind("table of numbers (.npy)", _untold, loosely=_begins(b"\x93NUMPY"))
CHECKPOINT = Kind("checkpoint of edgeprompt tune", _begins(b"archive/data.pkl", 30))
METRICS = Kind("metrics.jsonl of edgeprompt tune", _metrics)
ANSWERS = Kind("teacher's answers of edgeprompt tune", _answers)
RUN_ANSWERS = Kind("file of answers", _run_answers, loosely=_text)
RUN_PARQUET = Kind("parquet file of answers", _run_parquet, loosely=_begins(b"PAR1"))
JOURNAL = Kind("journal of edgeprompt run", _journal)
REPORT = Kind("report", _report, loosely=_text)
TEXT = Kind("text", _text, loosely=_text)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """While inside, what the operating system says against an output is an error that names it.

    Raises:
        OutputError: an `OSError` came.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        told = OutputError(f"output {str(path)!r} cannot be written: {reason}; give another path")
        told.errno, told.strerror = error.errno, reason
        raise told from error


def check_output(
    path: str | os.PathLike[str], kind: Kind, *, force: bool = False, sources: Iterable[object] = ()
) -> Path:
    """Check, before the work, that an output can be written and that nothing is lost by it.

    Args:
        path: The output.
        kind: What it will be.
        force: Whether an existing folder of this kind may be replaced, and a file that may be somebody else's; files
            that are told to be of the kind may always be.
        sources: What the command reads; what is no path of this machine (a hub id, rows in memory) counts for nothing.

    Returns:
        Where to write: symbolic links are followed.

    Raises:
        InputError: the path holds something that is not replaced, is a source or holds one, or cannot be written.
        OutputError: the operating system refuses it.
    """
    if str(path) == "-":
        raise InputError("output '-' is no path; leave out the option to write to stdout, or give another path")
    try:
        with writing(path):
            return _checked(Path(path), f"output {str(path)!r}", kind, force, sources)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"output {str(path)!r} is no path: {error}; give another one") from error


def _checked(path: Path, shown: str, kind: Kind, force: bool, sources: Iterable[object]) -> Path:
    target = Path(os.path.realpath(path))
    read = [Path(source) for source in sources if isinstance(source, (str, os.PathLike))]
    for source in read:
        _check_source(shown, path, target, source, kind)
    if not os.path.lexists(target):
        if path.exists():  # a link to what has no path: /dev/stdout as a pipe
            raise InputError(f"{shown} is no regular file; leave it out to write on stdout, or give another path")
        _check_parent(shown, target)
        return target
    if kind.folder:
        _check_folder(shown, target, kind, force)
    elif target.is_dir():
        raise InputError(f"{shown} is a folder; a {kind.name} is a file, so give a file's path")
    elif not target.is_file():
        raise InputError(f"{shown} is no regular file; leave it out to write on stdout, or give another path")
    if not target.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"{shown} is read-only; give another path, or make it writable")
    _check_parent(shown, target)
    if not kind.folder and target.stat().st_size and (reason := kind.stranger(target)):
        other = kind.loosely(target) if kind.loosely else reason
        if other is None and not force:
            raise InputError(f"{shown} exists already, and {reason}; give --force to replace it, or another path")
        if other is not None:
            raise InputError(f"{shown} is not replaced: {other}, no {kind.name}; give another path, or remove it first")
    return target


def _check_source(shown: str, path: Path, target: Path, source: Path, kind: Kind) -> None:
    source = source.expanduser()
    try:
        if not source.exists():
            return
        places = {Path(os.path.realpath(source)), Path(os.path.abspath(source))}
        same = target in places or (target.exists() and target.samefile(source))
    except (OSError, ValueError):  # no path at all: a long hub id, a name with a NUL
        return
    if same:
        raise InputError(f"{shown} is also what the command reads ({str(source)!r}); give another path")
    if kind.adds:
        return
    if any(target in place.parents for place in places):
        raise InputError(f"{shown} holds {str(source)!r}, which the command reads; give another path")
    if kind.loosely and target.exists() and source.is_dir() and any(place in target.parents for place in places):
        raise InputError(f"{shown} is a file of {str(source)!r}, which the command reads; give another path")


def _check_folder(shown: str, target: Path, kind: Kind, force: bool) -> None:
    if not target.is_dir():
        raise InputError(f"{shown} is a file; a {kind.name} is a folder, so give a folder's path")
    if kind.adds:
        if not os.access(target, os.W_OK | os.X_OK):
            raise InputError(f"{shown} is read-only; give another path, or make it writable")
        return
    for place, what in ((Path.cwd(), "the working directory"), (_home(), "the home folder")):
        if place is not None and (place == target or target in place.parents):
            holds = "is" if place == target else "holds"
            raise InputError(f"{shown} {holds} {what}, which is never replaced; give a folder of its own")
    if (target / ".git").exists():
        raise InputError(f"{shown} is a git checkout, which is never replaced; give a folder of its own")
    if not force:
        raise InputError(f"{shown} exists already; give --force to replace it, or another path")
    if any(target.iterdir()) and (reason := kind.stranger(target)):
        raise InputError(
            f"{shown} is not replaced: {reason}; --force replaces a {kind.name} of edgeprompt or an empty folder, so "
            "give another path, or remove it first"
        )


def _check_parent(shown: str, target: Path) -> None:
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{shown} cannot be made: {str(parent)!r} is a file; give another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{shown} cannot be written: the folder {str(parent)!r} is read-only; give another path")


def _home() -> Path | None:
    try:
        return Path(os.path.realpath(Path.home()))
    except RuntimeError:
        return None
