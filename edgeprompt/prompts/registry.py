"""The prompts of a runtime: their names, the folders they come from, and what a request takes with it.

A request gets its `LoadedPrompt` once, by name, and keeps it whatever happens to the name. An engine keeps no table of
names: what it derives from a prompt hangs on the `LoadedPrompt`, and goes when that is removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from edgeprompt.errors import BaseMismatchError, InputError, PromptChangedError, PromptFileError, PromptNotFoundError
from edgeprompt.package.files import read_regular
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import MAX_FILE_BYTES, PromptFile, check_infix, from_bytes, outline, tell_alike
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.prompts.weights import ALLOWED, check_weights, differ

SUFFIX = ".safetensors"
Stamp: TypeAlias = tuple[int, ...]
"""Of a file in a folder of prompts: it changes when the file is replaced or written into, also where that keeps its
size, its time of modification and its inode."""
_TICK_NS = 20_000_000
"""What is written within a tick of a file system's clock (10 ms at most) may have one stamp with what was there."""
_TRIES = 10
"""So often a file that is written into while it is read is read again."""

_LOG = logging.getLogger("edgeprompt")


class LoadedPrompt:
    """A checked prompt that requests can name.

    From a file, its tensors are kept until an engine is ready (`release`), then read again when they are needed, and
    the file must not change: thousands of prompts take little memory.
    """

    def __init__(
        self,
        name: str,
        prompt: PromptFile,
        *,
        path: Path | None = None,
        sha256: str | None = None,
        stamp: Stamp | None = None,
    ) -> None:
        self.name = name
        self.file = dataclasses.replace(
            prompt, prompt_embeddings=None, past_key_values=None, encoder_past_key_values=None
        )
        """Everything but the prompt's own tensors; the head is there."""
        self.num_virtual_tokens = prompt.num_virtual_tokens
        self.has_encoder_prefix = prompt.encoder_past_key_values is not None
        self.rows = 0 if prompt.prompt_embeddings is None else len(prompt.prompt_embeddings)
        """Virtual tokens in the text."""
        self.past_length = 0 if prompt.past_key_values is None else int(prompt.past_key_values.shape[3])
        """Positions whose keys and values the prompt brings: in front of the text, or inside it (`is_infix`)."""
        self.is_infix = prompt.is_infix
        if prompt.is_infix:
            try:
                check_infix(prompt)
            except ValueError as error:
                raise PromptFileError(f"prompt {name!r}: {error}") from error
        self.verbalizer: Verbalizer | None = None
        """Label words as the engine compiled them, which it does once."""
        self.stamp = stamp
        self.removed = False
        """Whether requests can no longer name it; nothing that is derived from it then stays."""
        self._path, self._sha256 = path, sha256
        self._whole: PromptFile | None = prompt

    @staticmethod
    def open(path: str | os.PathLike[str], *, name: str | None = None, stamp: Stamp | None = None) -> LoadedPrompt:
        """Read and check a file, once: what is added is what was checked, whoever replaces the file meanwhile.

        Raises:
            PromptFileError: missing, too large, broken, or breaking the format.
        """
        file = Path(path).absolute()
        data = _read(file)
        try:
            prompt = tell_alike(from_bytes(data))
        except PromptFileError as error:
            raise PromptFileError(f"bad prompt file {str(path)!r}: {error}") from error
        return LoadedPrompt(
            name or prompt.name, prompt, path=file, sha256=hashlib.sha256(data).hexdigest(), stamp=stamp
        )

    @property
    def sha256(self) -> str:
        """Hash of the prompt's file."""
        self._sha256 = self._sha256 or self.tensors().sha256
        return self._sha256

    @cached_property
    def is_prefix(self) -> bool:
        """Whether, in a decoder, keys and values in front of the text carry it; else virtual ids in the text do.

        Question answering as PEFT trains it reads the states of virtual tokens too, so these are run with the text.
        """
        unshifted = self.file.head_spec is not None and self.file.head_spec.input == "tokens_unshifted"
        if self.past_length:
            return not self.is_infix
        return self.file.template.prompt_is_prefix and not unshifted

    @property
    def virtual_ids(self) -> int:
        """How many virtual ids its template puts into a text's ids: for its rows, or for keys and values inside."""
        return self.past_length if self.is_infix else self.rows

    def release(self) -> None:
        """Keep the path and the hash of a prompt that came from a file, and its tensors no longer."""
        if self._path is not None:
            self._whole = None

    def tensors(self) -> PromptFile:
        """The prompt with its tensors.

        Raises:
            PromptFileError: the file is gone, or another than the one that was added (`PromptChangedError` where it
                is of a folder, and the name may have another file by now).
        """
        whole = self._whole
        if whole is not None:
            return whole
        assert self._path is not None
        if self.stamp is None:
            data = _read(self._path)
            if hashlib.sha256(data).hexdigest() != self._sha256:
                raise PromptFileError(f"prompt file {str(self._path)!r} has changed since it was added; add it again")
            return from_bytes(data)
        try:
            data = _read(self._path)
        except PromptFileError as error:
            raise PromptChangedError(f"{error}, and it was there when it was asked for; ask again") from error
        if hashlib.sha256(data).hexdigest() != self._sha256:
            raise PromptChangedError(f"prompt file {str(self._path)!r} has changed since it was asked for; ask again")
        return from_bytes(data)


class PromptRegistry:
    """Prompts by name. Every method may be called from any thread."""

    def __init__(
        self,
        manifest: Manifest,
        folders: Iterable[Path] = (),
        *,
        accept: Callable[[LoadedPrompt], None],
        forget: Callable[[LoadedPrompt], None],
        allow_other_weights: bool = False,
        package: str = "PACKAGE",
    ) -> None:
        """`accept` checks a prompt and makes it ready, or raises; `forget` hears of every one that goes.

        `allow_other_weights` is the rule for prompts of folders, and of those added without one; `package` is what
        messages call the package.
        """
        self._manifest, self._accept, self._forget = manifest, accept, forget
        self._allow_other_weights, self._package = allow_other_weights, package
        self._prompts: dict[str, LoadedPrompt] = {}
        self._folders = [*folders]
        self._fit: Mapping[Path, tuple[Stamp, bool]] = {}
        """Of files in folders: whether they can be served."""
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests can use: of the prompts that are ready, and of those in folders.

        The log says once of a file in a folder why it cannot be served, as far as its header tells.
        """
        # Without the lock, which may be held for ever in a forked process.
        found = {name: True for name, prompt in self._prompts.copy().items() if prompt.stamp is None}
        fit: dict[Path, tuple[Stamp, bool]] = {}
        for folder in tuple(self._folders):
            for name, path, stamp in _files_in(folder):
                if name in found:
                    continue
                settled = not 0 <= time.time_ns() - max(stamp[2:4]) < _TICK_NS
                known = self._fit.get(path)
                if known is None or known[0] != stamp:
                    known = (stamp, self._fits(name, path, tell=settled))
                if settled:
                    fit[path] = known
                found[name] = known[1]
        self._fit = fit
        return tuple(name for name, fits in found.items() if fits)

    def _fits(self, name: str, path: Path, *, tell: bool) -> bool:
        """Whether the header of a file is that of a prompt for the package."""
        try:
            self._check(outline(path), lambda: hashlib.sha256(_read(path)).hexdigest())
        except (PromptFileError, BaseMismatchError) as error:
            if tell:
                _LOG.warning("prompt %r of folder %r cannot be served: %s", name, str(path.parent), error)
            return False
        return True

    def add(
        self,
        prompt: str | os.PathLike[str] | PromptFile,
        *,
        name: str | None,
        allow_base_mismatch: bool = False,
        allow_other_weights: bool | None = None,
    ) -> str:
        """Make a prompt ready, replacing one of the same name.

        Args:
            prompt: path of a prompt file, or a `PromptFile`.
            name: None takes the file's.
            allow_base_mismatch: accept a prompt of another base whose sizes fit.
            allow_other_weights: accept a prompt tuned for other weights (`edgeprompt.prompts.weights`); None: as the
                registry was made.

        Returns:
            The name.

        Raises:
            PromptFileError: broken file.
            BaseMismatchError: made for another base, tokenizer or geometry.
            OtherWeightsError: tuned for weights that are too far from the package's.
            InputError: `prompt` is neither, or the name is no text.
        """
        if not isinstance(prompt, PromptFile | str | os.PathLike) or not isinstance(name, str | None):
            raise InputError(f"cannot add {prompt!r} as {name!r}; give a path or a PromptFile, and a name as text")
        if isinstance(prompt, PromptFile):
            loaded = LoadedPrompt(name or prompt.name, prompt)
        else:
            loaded = LoadedPrompt.open(prompt, name=name)
        with self._lock:
            self._add(loaded, allow_base_mismatch=allow_base_mismatch, allow_other_weights=allow_other_weights)
        return loaded.name

    def add_folder(self, folder: str | os.PathLike[str]) -> None:
        """Let requests name every prompt of a folder: prompt `name` is the file `name.safetensors`.

        Raises:
            InputError: there is no such folder.
        """
        if not isinstance(folder, str | os.PathLike) or not Path(folder).is_dir():
            raise InputError(f"no folder of prompts at {str(folder)!r}")
        self._folders.append(Path(folder).absolute())

    def remove(self, name: str) -> None:
        """Forget a prompt; requests that run keep it.

        Raises:
            PromptNotFoundError: no prompt of that name is ready.
        """
        _check_name(name)
        with self._lock:
            if name not in self._prompts:
                raise PromptNotFoundError(f"no prompt {name!r}; loaded: {', '.join(self._prompts) or 'none'}")
            self._replace(name, None)

    def find(self, name: str) -> LoadedPrompt:
        """A prompt by name; one in a folder is read when it is first named, and again when its file was replaced.

        Raises:
            PromptNotFoundError: no prompt of that name.
            PromptFileError, BaseMismatchError: the file of that name in a folder cannot be served.
        """
        _check_name(name)
        prompt = self._prompts.get(name)
        if prompt is not None and prompt.stamp is None:
            return prompt
        for folder in self._folders:
            stamp = _file_of(folder, name)[1]
            if stamp is None:
                continue
            if prompt is not None and prompt.stamp == stamp:
                return prompt
            with self._lock:
                prompt = self._prompts.get(name)
                if prompt is None or prompt.stamp not in (None, stamp):  # else another thread was faster
                    found = _open_settled(folder, name)
                    if found is None:  # it went away meanwhile
                        continue
                    self._add(found)
                    return found
            return prompt
        with self._lock:
            prompt = self._prompts.get(name)
            if prompt is not None and prompt.stamp is None:
                return prompt
            if prompt is not None:  # its file is gone
                self._replace(name, None)
        raise PromptNotFoundError(f"no prompt {name!r}; there are: {', '.join(self.names[:20]) or 'none'}")

    def _add(
        self, prompt: LoadedPrompt, *, allow_base_mismatch: bool = False, allow_other_weights: bool | None = None
    ) -> None:
        whole = prompt.tensors()
        if allow_base_mismatch:
            whole.check_geometry(self._manifest)
        else:
            self._check(whole, lambda: prompt.sha256, allow_other_weights)
        if other := differ(whole, self._manifest):
            _LOG.info("prompt %r was tuned for %s, the package is %s", prompt.name, other, self._manifest.precision)
        self._accept(prompt)
        prompt.release()
        self._replace(prompt.name, prompt)

    def _check(self, prompt: PromptFile, sha256: Callable[[], str], allow_other_weights: bool | None = None) -> None:
        prompt.check_base(self._manifest)
        if not (self._allow_other_weights if allow_other_weights is None else allow_other_weights):
            # Hashing a prompt takes time.
            known = sha256() if ALLOWED in self._manifest.extra else None
            check_weights(prompt, self._manifest, sha256=known, package=self._package)

    def _replace(self, name: str, prompt: LoadedPrompt | None) -> None:
        old = self._prompts.get(name)
        if prompt is None:
            del self._prompts[name]
        else:
            self._prompts[name] = prompt
        if old is not None:
            old.removed = True
            self._forget(old)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise PromptNotFoundError(f"no prompt {name!r}; the name of a prompt is a text")


def _files_in(folder: Path) -> Iterator[tuple[str, Path, Stamp]]:
    """The files of a folder that requests can name, in the order of their names."""
    try:
        files = sorted(file for file in os.listdir(folder) if file.endswith(SUFFIX))
    except OSError:  # the folder has gone
        return
    for name in (file.removesuffix(SUFFIX) for file in files):
        path, stamp = _file_of(folder, name)
        if stamp is not None:
            yield name, path, stamp


def _file_of(folder: Path, name: str) -> tuple[Path, Stamp | None]:
    """The file of a name, and its stamp; None where it is no name, or there is no regular file."""
    path = folder / f"{name}{SUFFIX}"
    if not isinstance(name, str) or not name or name != os.path.basename(name) or "\0" in name or name[0] == ".":
        return path, None
    try:
        name.encode()  # no request holds a name that is not UTF-8
        status = path.stat()
    except (OSError, UnicodeEncodeError):
        return path, None
    if not stat.S_ISREG(status.st_mode):
        return path, None
    return path, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def _open_settled(folder: Path, name: str) -> LoadedPrompt | None:
    """A prompt of a folder, all of whose bytes were there at one time; None where its file went away.

    A file that another replaced while it was read was whole; its stamp tells that it has to be read again.

    Raises:
        PromptFileError: the file is no prompt, or is written into all the time.
    """
    for _ in range(_TRIES):
        path, stamp = _file_of(folder, name)
        if stamp is None:
            return None
        age = time.time_ns() - max(stamp[2:4])
        with _kept(path):
            if _file_of(folder, name)[1] != stamp:
                continue
            if 0 <= age < _TICK_NS:
                time.sleep((_TICK_NS - age) / 1e9)
            try:
                found = LoadedPrompt.open(path, name=name, stamp=stamp)
            except PromptFileError:
                if _file_of(folder, name)[1] == stamp:
                    raise
                continue
            now = _file_of(folder, name)[1]
            if now is not None and (now == stamp or now[:2] != stamp[:2]):
                return found
    if _file_of(folder, name)[1] is None:
        return None
    raise PromptFileError(f"prompt file {str(path)!r} is being written; ask again when it is whole")


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """While inside, no other file gets the inode of this one, which tells a replaced file from a written one."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if os.name == "posix" else None
    except OSError:  # the file has gone, or cannot be read: opening it as a prompt says so
        held = None
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _read(file: Path) -> bytes:
    try:
        return read_regular(file, MAX_FILE_BYTES)
    except OSError as error:
        raise PromptFileError(f"cannot read prompt file {str(file)!r}: {error.strerror or error}") from error
