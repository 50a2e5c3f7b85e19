"""The prompts that a runtime serves: those that were added, and those in folders, read when a request names them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from edgeprompt.engines.base import Engine
from edgeprompt.errors import PromptNotFoundError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile, TunedFor
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.store import PromptStore

_LOG = logging.getLogger("edgeprompt")


class PromptRegistry(Mapping[str, PromptSource]):
    """The prompts that are ready in an engine, by name. Every method may be called from any thread."""

    def __init__(self, engine: Engine, folders: Iterable[Path]) -> None:
        self._engine = engine
        self._ready: dict[str, PromptSource] = {}
        self._stores = [PromptStore(folder) for folder in folders]
        self._stamps: dict[str, tuple[int, int, int]] = {}
        """Of prompts that came from a store: which state of the file."""
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> PromptSource:
        return self._ready[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ready)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests can use: of the prompts that are ready, and of those in folders."""
        return tuple(dict.fromkeys((*self._ready, *(name for store in self._stores for name in store))))

    def add(self, name: str, source: PromptSource) -> None:
        """Make a prompt ready, replacing one of the same name."""
        with self._lock:
            self._engine.add_prompt(name, source)
            source.release()
            self._ready[name] = source
            self._stamps.pop(name, None)

    def add_folder(self, folder: str | os.PathLike[str]) -> None:
        """Let requests name every prompt of a folder.

        Raises:
            InputError: there is no such folder.
        """
        self._stores.append(PromptStore(folder))

    def remove(self, name: str) -> None:
        """Forget a prompt.

        Raises:
            PromptNotFoundError: no prompt of that name is ready.
        """
        with self._lock:
            if name not in self._ready:
                raise PromptNotFoundError(f"no prompt {name!r}; loaded: {', '.join(self._ready) or 'none'}")
            self._engine.remove_prompt(name)
            del self._ready[name]
            self._stamps.pop(name, None)

    def ensure(self, name: str, read: Callable[[Path], object]) -> None:
        """Have a prompt ready: one in a folder is read when it is first named, and again when its file was replaced.

        Args:
            name: of the prompt.
            read: adds the prompt of a file under this name.

        Raises:
            PromptNotFoundError: no prompt of that name.
        """
        if name in self._ready and name not in self._stamps:
            return
        for store in self._stores:
            found = store.find(name)
            if found is not None:
                path, stamp = found
                if self._stamps.get(name) != stamp:
                    with self._lock:
                        if self._stamps.get(name) != stamp:  # else another thread was faster
                            read(path)
                            self._stamps[name] = stamp
                return
        with self._lock:
            if name in self._stamps:  # its file is gone
                self.remove(name)
        if name not in self._ready:
            raise PromptNotFoundError(f"no prompt {name!r}; there are: {', '.join(self.names[:20]) or 'none'}")


def open_prompt(
    prompt: str | os.PathLike[str] | PromptFile, manifest: Manifest, *, name: str | None, allow_base_mismatch: bool
) -> tuple[str, PromptSource]:
    """A prompt that fits a package, and the name to serve it under.

    Args:
        prompt: path of a prompt file, or a `PromptFile`.
        manifest: of the package.
        name: None takes the file's.
        allow_base_mismatch: accept a prompt of another base whose sizes fit.

    Raises:
        PromptFileError: broken file.
        BaseMismatchError: made for another base, tokenizer or geometry.
    """
    if isinstance(prompt, PromptFile):
        source, whole = PromptSource(prompt), prompt
    else:
        source = PromptSource.open(prompt)
        whole = source.tensors()
    if allow_base_mismatch:
        whole.check_geometry(manifest)
    else:
        whole.check_base(manifest)
    name = name or whole.name
    tuned = whole.tuned_for
    if tuned is not None and _other_weights(tuned, manifest):
        _LOG.info("prompt %r was tuned for %s, and the package is %s", name, tuned, manifest.precision)
    return name, source


def _other_weights(tuned: TunedFor, manifest: Manifest) -> bool:
    return tuned.precision != manifest.precision or tuned.weights_hash not in (None, manifest.weights_hash)
