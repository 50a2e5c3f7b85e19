"""Files of the Hugging Face Hub: `user/repo[@revision][/file]` wherever a base, a package or a prompt is a path.

What is downloaded lies in huggingface_hub's cache, and all files of one call are of one commit. Each is compared once
with the hash that the Hub names. Nothing of a repository is ever run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprompt.errors import HubError, MissingDependencyError

_PART = r"""[^/\\*?"<>|:\x00-\x1f\x7f]+"""
"""Of a file's path: what every system takes in a name."""
_FORM = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/[a-z]+/[\w.-]+|[\w.-]+))?"
    rf"(?:/(?P<file>{_PART}(?:/{_PART})*))?"
)
_FILES = (".safetensors", ".gguf", ".onnx", ".onnx_adapter", ".npy", ".pt", ".pth", ".bin", ".nemo", ".csv", ".json")
"""A name of two parts that ends so is a file of this machine, not a repository."""
CHECKED = "edgeprompt-checked"
"""Folder in a repository's cache whose empty files name the blobs that had their hash."""


@dataclass(frozen=True)
class HubPath:
    """`user/repo[@revision][/file]`."""

    given: str
    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Fetched:
    """Files of one commit, in the cache."""

    folder: Path
    """The snapshot, which has the repository's own layout."""
    commit: str
    repo: str

    @property
    def pinned(self) -> str:
        """`user/repo@commit`: the same files for ever."""
        return f"{self.repo}@{self.commit}"


def parse(given: object) -> HubPath | None:
    """What a text names on the Hub; None where it is a path of this machine, or can be nothing else."""
    text = str(given)
    found = _FORM.fullmatch(text)
    if found is None or Path(text).exists() or any(part in (".", "..") for part in re.split("[/@]", text)):
        return None
    if found["file"] is None and found["revision"] is None and found["repo"].endswith(_FILES):
        return None
    return HubPath(text, found["repo"], found["revision"], found["file"])


def fetch(
    wanted: HubPath,
    first: str,
    more: Callable[[Path], Iterable[tuple[str, bool]]] = lambda _: (),
    *,
    what: str,
) -> Fetched:
    """Bring files into the cache, from where they are taken the next time.

    Args:
        wanted: of `parse`.
        first: the file that must be there.
        more: from the path of the first to the others, each with whether it must be there.
        what: what is looked for, for messages: "package", "prompt file" ...

    Raises:
        HubError: it is not there, not allowed, not reachable, or damaged; the message says what to do.
        MissingDependencyError: the extra `hub` is not installed.
    """
    hub = _library(wanted, what)
    path = _download(hub, wanted, first, wanted.revision, what)
    folder = path
    for _ in Path(first).parts:
        folder = folder.parent
    commit = folder.name
    _check(path, wanted, first)
    for name, needed in more(path):
        try:
            found = _download(hub, wanted, name, commit, what)
        except _NotThereError:
            if needed:
                raise
            continue
        _check(found, wanted, name)
    return Fetched(folder, commit, wanted.repo)


def fetch_file(wanted: HubPath, *, what: str) -> Path:
    """The one file that a path names.

    Raises:
        HubError: as `fetch`, or the path names no file.
    """
    if wanted.file is None:
        raise HubError(f"{wanted.given!r} names a repository; a {what} is a file: give {wanted.given}/FILE")
    return fetch(wanted, wanted.file, what=what).folder / wanted.file


class _NotThereError(HubError):
    """A repository has no such file."""


def _library(wanted: HubPath, what: str) -> Any:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of every retry
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"there is no {what} at {wanted.given!r} on this machine, and to take it from the Hugging Face Hub needs "
            "huggingface_hub: pip install 'edgeprompt[hub]'"
        ) from error
    return huggingface_hub


def _download(hub: Any, wanted: HubPath, file: str, revision: str | None, what: str) -> Path:
    from huggingface_hub import constants, errors

    at, there = f"{wanted.given!r}", f"no {what} at {wanted.given!r} on this machine"
    try:
        return Path(hub.hf_hub_download(wanted.repo, file, revision=revision))
    except errors.GatedRepoError as error:
        raise HubError(
            f"{wanted.repo!r} is gated: accept its terms at {constants.ENDPOINT}/{wanted.repo}, then log in with: hf "
            "auth login (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{there}, and no repository {wanted.repo!r} on the Hub that you may see; if it is private, log in with: "
            "hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{wanted.repo!r} has no revision {revision!r}; give a branch, a tag or a commit") from error
    except errors.RemoteEntryNotFoundError as error:
        raise _NotThereError(f"{wanted.repo!r} has no file {file!r}, so {at} is no {what}") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and the Hub's cache has not all of it; unset it to download"
            raise _NotThereError(f"{there}; {file!r} is not in the cache: {why}") from error
        why = f"the Hub ({constants.ENDPOINT}) cannot be reached"
        raise _NotThereError(f"{there}; {file!r} is not in the cache, and {why}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{there}, and it is no name of the Hub: {_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise HubError(f"cannot download {file!r} of {wanted.repo!r}: {reason(error)}; try again") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise HubError(f"cannot download {file!r} of {wanted.repo!r}: {reason(error)}; try again") from error


def _check(path: Path, wanted: HubPath, file: str) -> None:
    """Compare a file with the hash that its blob is called by: SHA-256 of a large file, Git's SHA-1 of a small one.

    Raises:
        HubError: another file came; it is removed from the cache.
    """
    blob = path.resolve()
    expected = blob.name
    if not path.is_symlink() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return  # without links (Windows) the cache does not keep the hash
    mark = blob.parent.parent / CHECKED / expected
    status = blob.stat()
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    if mark.exists() and mark.read_text(encoding="ascii") == stamp:
        return
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % status.st_size)
    with blob.open("rb") as data:
        for piece in iter(lambda: data.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != expected:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{file!r} of {wanted.repo!r} came damaged: its hash is {digest.hexdigest()}, and the Hub names "
            f"{expected}; it is removed from the cache, so try again"
        )
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(stamp, encoding="ascii")


def reason(error: BaseException) -> str:
    """What failed, on one line; of a token that no header can hold, what is wrong with it, and nothing of it."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":  # of all that is sent, headers alone are
        return "the token (HF_TOKEN, or that of hf auth login) has a character that is not ASCII; copy it anew"
    return _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
