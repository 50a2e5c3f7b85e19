"""A session on disk: the keys and values of a text's beginning, so that another process goes on where this one was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgeprompt import names
from edgeprompt.errors import CapacityError, InputError
from edgeprompt.ort.kv_cache import KV, KVShape
from edgeprompt.ort.prefix_store import digest
from edgeprompt.package import strict_json
from edgeprompt.package.files import check_regular, write_atomic
from edgeprompt.package.outputs import SESSION

VERSION = 1


@dataclass(frozen=True)
class SavedSession:
    """Blocks of keys and values, with what they depend on."""

    facts: Mapping[str, Any]
    """The graph, the provider, the type, ONNX Runtime, the machine, and the tokens in a block."""
    prompt: str
    """Name of the prompt; empty without one."""
    prompt_sha256: str
    blocks: tuple[bytes, ...]
    """Their names: each is a hash of the prompt and of all token ids up to its end."""
    keys_and_values: KV
    """[2 * num_layers, heads, positions, head_size]."""


def write_session(path: str | os.PathLike[str], session: SavedSession) -> None:
    """Write a session whole or not at all; only an older session is replaced.

    Raises:
        InputError: something else lies at `path`.
        OutputError: it cannot be written.
    """
    about = {
        "version": VERSION,
        "facts": dict(session.facts),
        "prompt": session.prompt,
        "prompt_sha256": session.prompt_sha256,
        "blocks": [name.hex() for name in session.blocks],
        "sha256": digest(session.keys_and_values),
    }
    metadata = {names.SESSION_METADATA: strict_json.dumps(about)}
    write_atomic(path, save({names.PAST_KEY_VALUES: session.keys_and_values}, metadata=metadata), SESSION)


def read_session(path: str | os.PathLike[str], facts: Mapping[str, Any], shape: KVShape, limit: int) -> SavedSession:
    """Read a session that was saved under the same facts.

    Args:
        path: of the file.
        facts: what its keys and values must depend on.
        shape: of the graph's cache.
        limit: most bytes of keys and values.

    Raises:
        InputError: there is no session, its bytes are broken, or it was saved under other facts.
        CapacityError: it is larger than `limit`.
    """
    try:
        check_regular(path)
        with safe_open(Path(path), framework="numpy") as file:
            return _read(file, facts, shape, limit, str(path))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no session at {str(path)!r}") from error
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{str(path)!r} is no session that can be read: {error}") from error


def _read(file: Any, facts: Mapping[str, Any], shape: KVShape, limit: int, path: str) -> SavedSession:
    about = strict_json.loads((file.metadata() or {})[names.SESSION_METADATA])
    if about["version"] != VERSION:
        raise InputError(f"session {path!r} has version {about['version']}; this edgeprompt reads {VERSION}")
    other = [fact for fact, value in facts.items() if about["facts"].get(fact) != value]
    if other:
        raise InputError(
            f"session {path!r} was saved with another {' and '.join(other)}, so its keys and values do not fit here; "
            "ask the text again"
        )
    blocks = tuple(bytes.fromhex(name) for name in about["blocks"])
    positions = len(blocks) * int(facts["block"])
    if positions * shape.bytes_per_position > limit:
        raise CapacityError(
            f"session {path!r} has {positions * shape.bytes_per_position} bytes of keys and values, and "
            f"{limit} are free of the budget; raise prefix_budget"
        )
    expected = [2 * shape.num_layers, shape.num_heads, positions, shape.head_size]
    if file.get_slice(names.PAST_KEY_VALUES).get_shape() != expected:
        raise InputError(f"session {path!r} is broken: its blocks do not fit its tensor")
    found = file.get_tensor(names.PAST_KEY_VALUES)
    if found.dtype != np.dtype(shape.dtype) or digest(found) != about["sha256"]:
        raise InputError(f"session {path!r} is broken: its bytes have changed since it was saved")
    return SavedSession(about["facts"], str(about["prompt"]), str(about["prompt_sha256"]), blocks, found)
