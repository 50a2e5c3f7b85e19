"""The base fingerprint: the same for one base however it was loaded (float32, float16, bfloat16, from GGUF).

Format 2 covers every matrix and bias by the sign bits of all its values, which no float format changes: a merged
adapter or another training run flips some. Format 1, of prompts and packages made before, covers sampled rows of the
embedding alone. Fingerprints protect from mistakes; they are no signature.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.base.geometry import geometry_of, text_config
from edgeprompt.package import strict_json
from edgeprompt.package.manifest import FINGERPRINT_2, Geometry

_ROWS = 256
_CHUNK_VALUES = 1 << 24
_LAYER = re.compile(r"\.(\d+)\.")


def base_fingerprint(model: Any) -> str:
    """Hash a transformers model's geometry and the sign bits of its matrices and biases.

    Neither names nor the order of parameters count, so that versions of transformers agree; the number of a parameter's
    layer does. Heads for other tasks than language modelling are left out, and so are rows of padding behind
    `vocab_size`.

    Args:
        model: A transformers model, or a PEFT model around one.

    Returns:
        "sha256-2:", 64 hexadecimal digits, ".", and 16 digits of format 1, which older prompts are compared by.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = text_config(model.config)
    geometry = geometry_of(config)
    rows = sampled_rows(geometry.vocab_size)
    sample = model.get_input_embeddings().weight.detach()[rows].float().cpu().numpy()
    first = fingerprint_of(config.model_type, geometry, sample)
    return joined_fingerprint(first, {f"{layer}:{_digest(one)}" for layer, one in _covered(model, geometry.vocab_size)})


def joined_fingerprint(first: str, lines: Collection[str]) -> str:
    """The fingerprint of format 2, from format 1 and what `matrix_line` says of every matrix and bias."""
    text = "\n".join([first, *sorted(set(lines))])
    return f"{FINGERPRINT_2}{hashlib.sha256(text.encode()).hexdigest()}.{first.removeprefix('sha256:')[:16]}"


def matrix_line(name: str, values: Any) -> str:
    """What format 2 holds of a matrix or bias: the number of its layer, its shape and its signs."""
    layer = _LAYER.search(f".{name}")
    return f"{layer[1] if layer else ''}:{_digest(values)}"


def sampled_rows(vocab_size: int) -> list[int]:
    """Which rows of the embedding format 1 hashes; rows behind `vocab_size` are padding that some loaders add."""
    return sorted({index * vocab_size // _ROWS for index in range(_ROWS)})


def fingerprint_of(model_type: str, geometry: Geometry, sample: npt.NDArray[Any]) -> str:
    """The fingerprint of format 1, from its parts: all that a graph's embedding can give.

    Args:
        model_type: As transformers calls it.
        geometry: The base's sizes.
        sample: `sampled_rows` of the unquantised embedding, [rows, width].

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    facts = {
        "model_type": model_type,
        "vocab_size": geometry.vocab_size,
        "hidden_size": geometry.hidden_size,
        "num_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_key_value_heads,
        "head_size": geometry.head_size,
    }
    signs = np.packbits(sample > 0)
    return "sha256:" + hashlib.sha256(strict_json.dumps(facts).encode() + b"\n" + signs.tobytes()).hexdigest()


def _covered(model: Any, vocab_size: int) -> Iterator[tuple[str, Any]]:
    """(number of the layer or "", values) of every matrix and bias, each once however often it is tied."""
    tables = [model.get_input_embeddings().weight]
    parameters = dict(model.base_model.named_parameters())
    head = model.get_output_embeddings() if hasattr(model, "can_generate") and model.can_generate() else None
    if head is not None:
        tables.append(head.weight)
        parameters |= {f"head.{name}": value for name, value in head.named_parameters()}
    computed = {
        id(value)
        for module in model.modules()
        if "Sinusoidal" in type(module).__name__
        for value in module.parameters()
    }
    seen = set(computed)
    for name, value in parameters.items():
        if id(value) in seen or not (value.dim() > 1 or name.endswith("bias")):
            continue
        seen.add(id(value))
        layer = _LAYER.search(f".{name}")
        cut = any(value is table for table in tables)
        yield layer[1] if layer else "", value.detach()[:vocab_size] if cut else value.detach()


def _digest(values: Any) -> str:
    import torch

    from edgeprompt.base.mapped import release

    hashed = hashlib.sha256(str(list(values.shape)).encode())
    rows = max(1, _CHUNK_VALUES // max(1, values[0].numel()))
    for part in torch.split(values, rows):
        hashed.update(np.packbits(torch.signbit(part).cpu().numpy().ravel()).tobytes())
        release(part)
    return hashed.hexdigest()
