"""A prompt as keys and values for other runtimes, computed on the very graph that will serve it.

transformers.js and others start a decoder from a cache of their own making: `past_key_values.{i}.key` and `.value`,
`[1, num_key_value_heads, length, head_size]`, an attention mask over prefix and text, and the text's ids alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.ort.session import graph_inputs, open_session
from edgeprompt.package import strict_json
from edgeprompt.package.files import atomic_file
from edgeprompt.package.folder import Package, open_package
from edgeprompt.package.outputs import KV
from edgeprompt.prompts.file import PromptFile

DTYPES = ("float32", "float16")

Array = npt.NDArray[np.float32]


def write_kv(
    prompt: PromptFile, path: str | os.PathLike[str], package: str | os.PathLike[str] | None, *, dtype: str = "float32"
) -> None:
    """Write a prompt's keys and values as safetensors.

    The metadata names the graph (its weights' hash), the base and the prompt's hash, so that nobody mixes them up.

    Args:
        prompt: made for the package's base, with its virtual tokens in front of the text.
        path: the file.
        package: the package of a decoder, whose graph will serve the prefix.
        dtype: "float32" or "float16".

    Raises:
        InputError: no package, or an unknown type.
        BaseMismatchError: the prompt was made for another base.
        UnsupportedError: the prompt is none that keys and values can hold, or its values do not fit the type.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, allowed: {', '.join(DTYPES)}")
    if package is None or not (Path(package) / names.MANIFEST).is_file():
        raise InputError("keys and values are computed on the graph that serves them: give its package as --base")
    opened = open_package(package)
    manifest = opened.manifest
    if manifest.architecture != names.DECODER_ONLY:
        raise UnsupportedError(
            f"package {str(package)!r} is {manifest.architecture}; a prompt is keys and values on decoder-only bases"
        )
    prompt.check_base(manifest)
    if prompt.head_spec is not None or not prompt.num_virtual_tokens:
        raise UnsupportedError(f"prompt {prompt.name!r} is more than a prefix (a head), or has no virtual tokens")
    if prompt.is_infix or (prompt.past_key_values is None and not prompt.template.prompt_is_prefix):
        raise UnsupportedError(
            f"prompt {prompt.name!r} has virtual tokens inside its text ({prompt.template}); keys and values stand in "
            "front of it"
        )
    kv = prefix_of(prompt, opened)
    largest, most = float(np.abs(kv).max()), float(np.finfo(dtype).max)
    if not largest <= most:
        raise UnsupportedError(
            f"keys and values of prompt {prompt.name!r} reach {largest:.4g}, and {dtype} ends at "
            f"{most:.4g}{'; write them as float32' if dtype == 'float16' else ''}"
        )
    tensors = {}
    for layer in range(manifest.geometry.num_layers):
        for index, part in enumerate(("key", "value")):
            tensors[names.past(layer, part)] = np.ascontiguousarray(kv[2 * layer + index][None], dtype)
    metadata = {
        "version": 1,
        "name": prompt.name,
        "length": prompt.num_virtual_tokens,
        "base": {"name": manifest.base.name, "fingerprint": manifest.base.fingerprint},
        "weights_hash": manifest.weights_hash,
        "prompt_sha256": prompt.sha256,
        "template": prompt.template.without_prompt().to_json(),
    }
    from safetensors.numpy import save_file

    with atomic_file(path, KV) as temporary:
        save_file(tensors, temporary, metadata={names.KV_METADATA: strict_json.dumps(metadata)})


def prefix_of(prompt: PromptFile, package: Package) -> Array:
    """float32 [2 * num_layers, num_key_value_heads, length, head_size]: what the package's graph makes of a prompt."""
    geometry = package.manifest.geometry
    if prompt.past_key_values is not None:
        past = prompt.past_key_values.astype(np.float32)
        return np.ascontiguousarray(past.reshape(-1, *past.shape[2:]))
    assert prompt.prompt_embeddings is not None
    session = open_session(package.graph("model"), provider="cpu").ort
    count = prompt.num_virtual_tokens
    dtype = np.dtype(package.manifest.kv_dtype)
    empty = np.zeros((1, geometry.num_key_value_heads, 0, geometry.head_size), dtype)
    keys = [(layer, part) for layer in range(geometry.num_layers) for part in ("key", "value")]
    feeds = {
        names.INPUT_IDS: np.arange(count, dtype=np.int64)[None] + geometry.vocab_size,
        names.ATTENTION_MASK: np.ones((1, count), np.int64),
        names.POSITION_IDS: np.arange(count, dtype=np.int64)[None],
        names.PROMPT_EMBEDDINGS: prompt.prompt_embeddings.astype(np.float32),
        **{names.past(*key): empty for key in keys},
    }
    inputs = {value.name for value in graph_inputs(session)}
    found = session.run(
        [names.present(*key) for key in keys], {name: value for name, value in feeds.items() if name in inputs}
    )
    return np.stack([value[0].astype(np.float32) for value in found])
