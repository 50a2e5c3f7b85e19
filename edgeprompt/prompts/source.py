"""Where a prompt's tensors come from: memory, or its file, so that thousands of prompts take little memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from edgeprompt.errors import PromptFileError
from edgeprompt.package.files import read_regular
from edgeprompt.prompts.file import MAX_FILE_BYTES, PromptFile, from_bytes


class PromptSource:
    """A checked prompt. From a file, its tensors are kept until it has been added (`release`), then read again when
    they are needed, and the file must not change."""

    def __init__(self, prompt: PromptFile, path: Path | None = None, sha256: str | None = None) -> None:
        self.num_virtual_tokens = prompt.num_virtual_tokens
        self.has_past = prompt.past_key_values is not None
        self.has_encoder_prefix = prompt.encoder_past_key_values is not None
        self._path, self._sha256 = path, sha256
        self._whole: PromptFile | None = prompt
        self.prompt = dataclasses.replace(
            prompt, prompt_embeddings=None, past_key_values=None, encoder_past_key_values=None
        )
        """Everything but the prompt's own tensors."""

    @staticmethod
    def open(path: str | os.PathLike[str]) -> PromptSource:
        """Read and check a file, once: what is added is what was checked, whoever replaces the file meanwhile.

        Raises:
            PromptFileError: missing, too large, broken, or breaking the format.
        """
        file = Path(path).absolute()
        data = _read(file)
        try:
            return PromptSource(from_bytes(data), file, hashlib.sha256(data).hexdigest())
        except PromptFileError as error:
            raise PromptFileError(f"bad prompt file {str(path)!r}: {error}") from error

    @property
    def sha256(self) -> str:
        """Hash of the prompt's file."""
        return self._sha256 or self.tensors().sha256

    def release(self) -> None:
        """Keep the path and the hash of a prompt that came from a file, and its tensors no longer."""
        if self._path is not None:
            self._whole = None

    def tensors(self) -> PromptFile:
        """The prompt with its tensors.

        Raises:
            PromptFileError: the file is gone, or another than the one that was added.
        """
        whole = self._whole
        if whole is not None:
            return whole
        assert self._path is not None
        data = _read(self._path)
        if hashlib.sha256(data).hexdigest() != self._sha256:
            raise PromptFileError(f"prompt file {str(self._path)!r} has changed since it was added; add it again")
        return from_bytes(data)


def _read(file: Path) -> bytes:
    try:
        return read_regular(file, MAX_FILE_BYTES)
    except OSError as error:
        raise PromptFileError(f"cannot read prompt file {str(file)!r}: {error.strerror or error}") from error
