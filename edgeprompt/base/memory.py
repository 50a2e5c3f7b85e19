"""Says before work starts whether a base fits into memory, instead of being killed halfway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprompt.errors import CapacityError
from edgeprompt.ort.free_memory import free_memory

_PROCESS = 0.7e9
"""Bytes of the libraries, and of what they allocate for any base."""
_HELD = 5.4
"""Bytes a parameter that cannot stay in its file: in float32, and as it is written."""
_QUANTISED = 5.5
"""Bytes for each value of the largest matrix while that is quantised: in float32, as codes, and a part in float32."""
_ANSWERS = 0.4e9
"""Bytes of the logits that are compared."""
_TRAINED = 2e9
"""Bytes of a few short texts' activations, which wait for the backward pass."""
_OBSERVED = 10.4
"""Bytes a parameter of a base whose matrices' inputs and gradients are kept over calibration texts (measured in all:
2.2 GB for SmolLM2, 4.0 GB for Gemma 3 270M)."""
_SERVED = {"fp32": 4.2, "fp16": 8.4, "int8": 2.2, "int4": 1.5, "gguf": 2.2}
"""Bytes a parameter of a package that ONNX Runtime has open: packed weights, and the file's own where it keeps them."""


@dataclass(frozen=True)
class Sizes:
    """How large a base is."""

    parameters: int
    largest: int = 0
    """Values of its largest matrix."""
    in_memory: int = 0
    """Parameters that loading puts into memory in float32, because they cannot be mapped from their file."""


Need = Callable[[Sizes], float]
"""Bytes of memory that work on a base takes."""


def to_load(sizes: Sizes) -> float:
    """A base in float32."""
    return 4.2 * sizes.parameters


def to_train(sizes: Sizes) -> float:
    """A base that stays in its files while a prompt is trained: a matrix at a time in float32, and activations."""
    return _PROCESS + _HELD * sizes.in_memory + 4.2 * sizes.largest + _TRAINED


def to_observe(sizes: Sizes) -> float:
    """A base that is loaded, while int4 or int8 looks at what its matrices are fed."""
    return _OBSERVED * sizes.parameters


def to_validate(precision: str) -> Need:
    """A base that stays in its files, beside its package."""
    return lambda sizes: _PROCESS + _HELD * sizes.in_memory + _SERVED[precision] * sizes.parameters + _ANSWERS


def to_export(precision: str) -> Need:
    """An export and its validation: one after the other, while the base stays in its files."""
    served = to_validate(precision)
    return lambda sizes: max(_PROCESS + _HELD * sizes.in_memory + _QUANTISED * sizes.largest, served(sizes))


def check_memory(given: str, sizes: Sizes, need: Need = to_load) -> None:
    """Refuse a base that memory is too small for.

    Args:
        given: The base as the user named it.
        sizes: How large it is.
        need: What the work ahead takes.

    Raises:
        CapacityError: says what is needed and what is free; never where the system does not say what is free.
    """
    free, needed = free_memory(), need(sizes)
    if free is not None and needed > free:
        raise CapacityError(
            f"{given!r} has {sizes.parameters / 1e9:.2f} billion parameters and needs about {needed / 1e9:.1f} GB of "
            f"memory, {free / 1e9:.1f} GB are free; close other programs, or use a machine with more memory"
        )
