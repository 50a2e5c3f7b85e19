"""Prefixes on disk, so that a device computes a prompt's keys and values once, not at every start."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgeprompt import names
from edgeprompt.errors import InputError
from edgeprompt.ort.kv_cache import KV
from edgeprompt.package import strict_json
from edgeprompt.package.files import check_regular, write_atomic
from edgeprompt.package.outputs import PREFIX

_LOG = logging.getLogger("edgeprompt")
_KEY, _DIGEST = "key", "sha256"
_FORMAT = "2"
"""Files of the format before may hold what wrongly read weights computed (`edgeprompt.ort.graph_cache`)."""


def facts_of(*, weights_hash: str, provider: str, dtype: str, ort_version: str) -> dict[str, str]:
    """What keys and values depend on beside the prompt and the text."""
    return {
        "format": _FORMAT,
        "weights_hash": weights_hash,
        "provider": provider,
        "dtype": dtype,
        "onnxruntime": ort_version,
        "machine": platform.machine(),
    }


class PrefixStore:
    """A folder of prefixes, each bound to what computed it.

    A file is used only if its key (graph, prompt, provider, type, ONNX Runtime, machine) and the hash of its bytes are
    right; anything else is computed again and written over. Files are written whole or not at all.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: Mapping[str, str]) -> None:
        """`facts`: as `facts_of` gives them."""
        self._folder, self._facts = Path(folder), facts

    def path(self, prompt_sha256: str) -> Path:
        """Where a prompt's prefix is kept."""
        return self._folder / (hashlib.sha256(self._key(prompt_sha256).encode()).hexdigest()[:40] + ".safetensors")

    def read(self, prompt_sha256: str, shape: tuple[int, ...]) -> KV | None:
        """The prefix [2 * num_layers, heads, positions, head_size], or None: not there, of another key, or broken."""
        path = self.path(prompt_sha256)
        if not path.exists():
            return None
        try:
            check_regular(path)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                prefix: KV = file.get_tensor(names.PAST_KEY_VALUES)
            expected = {_KEY: self._key(prompt_sha256), _DIGEST: digest(prefix)}
            if metadata == expected and prefix.shape == shape and prefix.dtype == np.dtype(self._facts["dtype"]):
                return prefix
            reason = "it belongs to another graph, prompt or machine, or its bytes have changed"
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            reason = str(error)
        _LOG.warning("cached prefix %s is not used and is computed again: %s", path, reason)
        return None

    def write(self, prompt_sha256: str, prefix: KV) -> None:
        """Keep a prefix; where the folder cannot be written the prefix is simply not kept."""
        metadata = {_KEY: self._key(prompt_sha256), _DIGEST: digest(prefix)}
        path = self.path(prompt_sha256)
        try:
            path.unlink(missing_ok=True)  # what was read and was not used; its name is a hash, so it is ours
            write_atomic(path, save({names.PAST_KEY_VALUES: prefix}, metadata=metadata), PREFIX)
        except (OSError, InputError) as error:  # a folder or a foreign file lies in its place
            _LOG.warning("cannot keep a prefix in %s: %s", self._folder, getattr(error, "strerror", None) or error)

    def _key(self, prompt_sha256: str) -> str:
        return strict_json.dumps({**self._facts, "prompt": prompt_sha256})


def digest(prefix: KV) -> str:
    """SHA-256 of keys and values."""
    return hashlib.sha256(np.ascontiguousarray(prefix).data).hexdigest()
