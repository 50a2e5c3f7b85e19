"""The base fingerprint: the same for one base however it was loaded (float32, float16, bfloat16, from GGUF)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.base.geometry import geometry_of, text_config
from edgeprompt.package import strict_json
from edgeprompt.package.manifest import Geometry

_ROWS = 256


def base_fingerprint(model: Any) -> str:
    """Hash a transformers model's geometry and the signs of sampled rows of its input embedding.

    Signs, because every float format keeps them: values rounded twice (to float16, then to bfloat16) differ in the
    last bit from values rounded once. Fingerprints protect from mistakes; they are no signature.

    Args:
        model: A transformers model, with or without a head, or a PEFT model around one.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = text_config(model.config)
    rows = sampled_rows(geometry_of(config).vocab_size)
    sample = model.get_input_embeddings().weight.detach()[rows].float().cpu().numpy()
    return fingerprint_of(config.model_type, geometry_of(config), sample)


def sampled_rows(vocab_size: int) -> list[int]:
    """Which rows of the embedding are hashed; rows behind `vocab_size` are padding that some loaders add."""
    return sorted({index * vocab_size // _ROWS for index in range(_ROWS)})


def fingerprint_of(model_type: str, geometry: Geometry, sample: npt.NDArray[Any]) -> str:
    """The fingerprint from its parts.

    Args:
        model_type: As transformers calls it.
        geometry: The base's sizes.
        sample: `sampled_rows` of the unquantised embedding, [rows, width].
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
