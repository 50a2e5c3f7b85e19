"""Files and folders that appear whole or not at all, and their hashes."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from edgeprompt.package import strict_json
from edgeprompt.package.outputs import Kind, check_output, writing

_PARTIAL = ".partial"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        OSError: missing, no regular file (a pipe would wait for ever, a device has no end), larger than `limit`, or
            holding more than its size says (it is being written, or is one of `/proc`). `strerror` says which.
    """
    with open_regular(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1)
    if len(data) > size:
        raise OSError(errno.EINVAL, f"it holds more than the {size} bytes that its size says; read it when it is whole")
    return data


@contextmanager
def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file of at most `limit` bytes for reading; nothing else is opened, and opening never waits.

    Raises:
        OSError: as `read_regular`.
    """
    check_regular(path, limit)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        _check_status(os.fstat(handle), limit)  # of what was opened, whatever was put in its place meanwhile
        yield file


def check_regular(path: str | os.PathLike[str], limit: int | None = None) -> int:
    """The size in bytes of a regular file of at most `limit` bytes, for libraries that open a path themselves.

    Raises:
        OSError: as `read_regular`.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"it is no path ({error})") from error
    return _check_status(status, limit)


def _check_status(status: os.stat_result, limit: int | None) -> int:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, and only regular files are read")
    if limit is not None and status.st_size > limit:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes; at most {limit} are allowed")
    return status.st_size


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(
    path: str | os.PathLike[str], data: bytes, kind: Kind, *, force: bool = False, sources: Iterable[object] = ()
) -> None:
    """Write `data` to `path` through a temporary file in the same folder (fsync, then rename); see `atomic_file`."""
    with atomic_file(path, kind, force=force, sources=sources) as temporary, writing(path):
        temporary.write_bytes(data)


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], kind: Kind, *, force: bool = False, sources: Iterable[object] = ()
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any failure it is removed.

    Args:
        path: The output; a symbolic link is followed.
        kind: What it will be; only an older file of the kind is replaced.
        force: Also replace one that may be somebody else's (`check_output`).
        sources: What the command reads, which is never replaced.

    Raises:
        InputError: `path` is refused by `check_output`, at the start or once the file is whole.
        OutputError: the operating system refuses it.
    """
    sources = tuple(sources)
    target = check_output(path, kind, force=force, sources=sources)
    with _parent(target, path):
        with writing(path):
            _sweep(target)
            handle, name = tempfile.mkstemp(prefix=_prefix(target, os.getpid()), suffix=_PARTIAL, dir=target.parent)
            os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with writing(path):
                temporary.chmod(0o666 & ~_umask())
                _sync(temporary)
                check_output(path, kind, force=force, sources=sources)  # also what came to lie there meanwhile
                temporary.replace(target)
                _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], kind: Kind, *, force: bool = False, sources: Iterable[object] = ()
) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on any failure it is removed.

    An existing `path` is refused without `force`; with it, an older folder of the kind, or an empty one, is replaced
    after the new one is whole.

    Args:
        path: The output; a symbolic link is followed.
        kind: What it will be.
        force: Replace an older one.
        sources: What the command reads, which is never replaced.

    Raises:
        InputError: `path` is refused by `check_output`, at the start or once the folder is whole.
        OutputError: the operating system refuses it.
    """
    sources = tuple(sources)
    target = check_output(path, kind, force=force, sources=sources)
    with _parent(target, path):
        with writing(path):
            _sweep(target)
            temporary = Path(tempfile.mkdtemp(prefix=_prefix(target, os.getpid()), suffix=_PARTIAL, dir=target.parent))
        try:
            yield temporary
            with writing(path):
                temporary.chmod(0o777 & ~_umask())
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _sync(file)
                check_output(path, kind, force=force, sources=sources)  # also what came to lie there meanwhile
                _swap(temporary, target)
                _sync(target.parent)
        finally:
            _remove(temporary)


def _swap(temporary: Path, target: Path) -> None:
    """Rename a folder to `target`; an old one there goes when the new one is in its place, and stays if that fails."""
    if not target.exists():
        temporary.replace(target)
        return
    if _exchange(temporary, target):
        return  # the old one is the temporary one now
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = aside / target.name
    try:
        target.replace(old)
        temporary.replace(target)
    finally:  # also where a signal comes between the two
        if old.exists() and not target.exists():
            old.replace(target)
        _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, so that at no moment one of them is missing; False where that cannot be done."""
    name, flag = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}.get(sys.platform, ("", 0))
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name) if name else None
    except (OSError, AttributeError):  # an older C library
        return False
    here = -2 if sys.platform == "darwin" else -100  # AT_FDCWD
    return function is not None and function(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(flag)) == 0


def _remove(folder: Path) -> None:
    """Remove a folder, also where a signal comes meanwhile: the second one ends the process."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _parent(target: Path, path: str | os.PathLike[str]) -> Iterator[None]:
    """Make the folders above `target`; those that were made go again if nothing came to lie in them."""
    made = []
    for folder in (target.parent, *target.parent.parents):
        if folder.exists():
            break
        made.append(folder)
    try:
        with writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def stamps_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the paths, sizes and times of files: of those that are too many or too large to be read."""
    facts = [(str(path), status.st_size, status.st_mtime_ns) for path, status in ((one, one.stat()) for one in paths)]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_tokenizer(tokenizer_json: bytes) -> str:
    """Fingerprint of a `tokenizer.json`: vocabulary and rules, whatever its padding, truncation, key order, or way to
    write merges ("a b" or ["a", "b"])."""
    data = json.loads(tokenizer_json)
    for key in ("padding", "truncation", "version"):
        data.pop(key, None)
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return "sha256:" + hashlib.sha256(strict_json.dumps(data).encode()).hexdigest()


def _prefix(target: Path, process: int) -> str:
    return f"{_stem(target)}{process}-"


def _stem(target: Path) -> str:
    return f".{target.name}.{platform.node()}-"


def _sweep(target: Path) -> None:
    """Remove what processes of this machine left beside `target` when they were killed."""
    for left in target.parent.glob(f"{glob.escape(_stem(target))}*{_PARTIAL}"):
        process = left.name.removeprefix(_stem(target)).partition("-")[0]
        if process.isdigit() and not _runs(int(process)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name == "nt":  # there, signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
