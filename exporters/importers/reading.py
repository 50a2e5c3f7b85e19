"""Foreign files, read without running anything in them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import MissingDependencyError, SourceError, UnsupportedError
from edgeprompt.package.files import check_regular, read_regular

Array = npt.NDArray[Any]
Keep = Callable[[str], bool]

MAX_JSON_BYTES = 16 << 20
MAX_PROMPT_BYTES = 1 << 30
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_json(file: Path) -> dict[str, Any]:
    """A foreign JSON object; unknown keys are welcome.

    Raises:
        SourceError: missing, no regular file, too large, or no JSON object.
    """
    try:
        data = json.loads(read_regular(file, MAX_JSON_BYTES))
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{str(file)!r} must hold a JSON object, found {type(data).__name__}")
    return data


def read_tensors(file: Path, keep: Keep = lambda name: True) -> dict[str, Array]:
    """Tensors of a `.safetensors` file or of a PyTorch file whose name `keep` accepts; bfloat16 becomes float32.

    Only the tensors kept are read, so that a checkpoint of a whole model costs what its prompt costs.

    Raises:
        SourceError: missing, broken, not a mapping of names to float tensors, or not finite.
        UnsupportedError: a pickle that holds more than tensors.
    """
    found = _from_safetensors(file, keep) if file.suffix == ".safetensors" else flatten(load_pickle(file), file, keep)
    _printable(found, file)
    return found


@dataclass(frozen=True)
class Contents:
    """What detection looks at: a folder's files, a file's tensor names, or the rank of its only tensor."""

    files: frozenset[str] = frozenset()
    tensors: tuple[str, ...] = ()
    rank: int = 0


def peek(source: Path) -> Contents:
    """What `source` holds, without reading tensors.

    Raises:
        SourceError: nothing is there, or the file is broken.
        UnsupportedError: a pickle that holds more than tensors.
    """
    if source.is_dir():
        return Contents(files=frozenset(path.name for path in source.iterdir()))
    check_file(source)
    if source.suffix == ".safetensors":
        return Contents(tensors=_safetensors_names(source))
    if source.suffix == ".npy":
        return Contents(rank=load_npy(source).ndim)
    if source.suffix in PICKLES:
        state = load_pickle(source)
        if isinstance(state, Mapping):
            return Contents(tensors=_printable([name for name, _ in _walk(state, "", 0)], source))
        return Contents(rank=getattr(state, "ndim", 0))
    return Contents()


def check_file(file: Path) -> None:
    """Refuse what is no regular file, before a library opens it.

    Raises:
        SourceError: missing, or a folder, pipe, socket or device.
    """
    try:
        check_regular(file)
    except FileNotFoundError as error:
        raise SourceError(f"nothing is at {str(file)!r}; give a prompt's file or folder") from error
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error


def is_there(file: Path) -> bool:
    """Whether something that is no folder has this name; `check_file` says what is wrong with it."""
    return file.exists() and not file.is_dir()


def load_pickle(file: Path) -> Any:
    """`torch.load` with `weights_only=True`: tensors and plain containers; nothing in the file is run.

    Raises:
        SourceError: missing or broken.
        UnsupportedError: the file needs more than tensors.
        MissingDependencyError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"{file.name} is a PyTorch file: pip install 'edgeprompt[export]'") from error
    check_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # legacy formats and TypedStorage are no news to the user
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except Exception as error:  # unpickling a broken file can raise anything
        text = " ".join(str(error).split())
        needs = re.search(r"(?:GLOBAL |[Uu]nsupported (?:class|operand|global):? ?(?:GLOBAL )?)([\w.]+)?", text)
        if needs:
            what = needs[1] or "code"
            raise UnsupportedError(
                f"{str(file)!r} is a pickle that holds more than tensors ({what}), and loading it would run its code; "
                "load it where you trust it and save its state_dict() with safetensors, then convert that"
            ) from error
        reason = text.partition(". ")[0][:200] or type(error).__name__
        raise SourceError(f"{str(file)!r} is no readable PyTorch file: {reason}") from error


def load_npy(file: Path) -> Array:
    """A `.npy` array of floats, memory-mapped and without pickle.

    Raises:
        SourceError: missing, broken, or not float.
    """
    check_file(file)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except Exception as error:  # numpy parses the header as a literal, which can raise much
        raise SourceError(f"{str(file)!r} is no readable .npy file: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(array, np.ndarray):
        raise SourceError(f"{str(file)!r} holds several arrays; give one .npy file")
    return _checked(file.name, np.asarray(array))


def flatten(state: Any, file: Path, keep: Keep = lambda name: True) -> dict[str, Array]:
    """The tensors of nested mappings, names joined by dots.

    Raises:
        SourceError: not a mapping, or a kept tensor is not float or not finite.
    """
    if not isinstance(state, Mapping):
        raise SourceError(f"{str(file)!r} holds a {type(state).__name__}, expected named tensors (a state_dict)")
    found: dict[str, Array] = {}
    for name, value in _walk(state, "", 0):
        if keep(name):
            found[name] = as_array(value, name)
    return found


def as_array(tensor: Any, name: str) -> Array:
    """A torch tensor as numpy; bfloat16 and float64 become float32.

    Raises:
        SourceError: sparse, quantised, without data, or not finite.
    """
    import torch

    if tensor.is_sparse or tensor.is_quantized or tensor.is_meta or tensor.layout is not torch.strided:
        raise SourceError(f"tensor {name!r} is {tensor.layout} {tensor.dtype}; a dense float tensor is needed")
    plain = tensor.detach()
    return _checked(name, (plain.float() if plain.dtype in (torch.bfloat16, torch.float64) else plain).numpy())


def _walk(state: Mapping[Any, Any], path: str, depth: int) -> Iterable[tuple[str, Any]]:
    import torch

    if depth > 8:
        return
    for key, value in state.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _walk(value, name, depth + 1)


def _safetensors_names(file: Path) -> tuple[str, ...]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{str(file)!r} is no readable safetensors file: {error}") from error
    return _printable(names, file)


def _printable(names: Iterable[str], file: Path) -> tuple[str, ...]:
    """Names as they are: they stand in reports and messages, each of one line."""
    for name in names:
        if not name.isprintable():
            raise SourceError(f"{str(file)!r} has a tensor called {name!r}; names must be printable")
    return tuple(names)


def _from_safetensors(file: Path, keep: Keep) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    check_file(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys() if keep(name)}  # noqa: SIM118
            found = {name: opened.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"}
        if "BF16" in kinds.values():  # numpy has no bfloat16
            import torch

            with safe_open(file, framework="pt") as opened:
                for name in (name for name, kind in kinds.items() if kind == "BF16"):
                    found[name] = opened.get_tensor(name).to(torch.float32).numpy()
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{str(file)!r} is no readable safetensors file: {error}") from error
    return {name: _checked(name, found[name]) for name in kinds}


def _checked(name: str, array: Array) -> Array:
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype not in (np.float16, np.float32):
        if array.dtype.kind in "iub":
            return array
        raise SourceError(f"tensor {name!r} is {array.dtype}; a float tensor is needed")
    if array.nbytes > MAX_PROMPT_BYTES:
        raise SourceError(f"tensor {name!r} has {array.nbytes} bytes; a prompt has at most {MAX_PROMPT_BYTES}")
    if not np.isfinite(array).all():
        raise SourceError(f"tensor {name!r} holds NaN or infinity; the training that wrote it went wrong")
    return array
