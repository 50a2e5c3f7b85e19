"""The tensors that a transformers folder holds: safetensors or PyTorch files, whole or in shards, none read yet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeprompt.base.memory import Sizes
from edgeprompt.base.source import WEIGHTS, check_contents, one_line, read_json
from edgeprompt.errors import SourceError

_MAX_HEADER = 100_000_000
"""What safetensors allows."""
MAPPED = ("F32", "F16", "BF16")
"""Types that computing takes as they are, from the file."""
_FLOATS = ("F64", *MAPPED)
_TRANSPOSED = {"tf": "TensorFlow", "flax": "Flax"}
"""What transformers writes into files of other libraries."""


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Tensors by name, each readable as `tensor[...]`: mapped from disk where the format allows it.

    The same file is chosen that transformers would choose.

    Raises:
        SourceError: no weights, a shard is missing or cut short, or the index and the shards contradict each other.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _read_files([folder / name])
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, folder / f"{name}.index.json")
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".gguf", ".bin", ".safetensors", ".pt"))
    found = f"; it holds {', '.join(others[:4])}" if others else ""
    raise SourceError(
        f"folder {str(folder)!r} has no weights: {', '.join(WEIGHTS)}, or either with an index in shards{found}"
    )


def map_checkpoint(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of `read_checkpoint` with those of safetensors files as PyTorch tensors that lie in the files."""
    from edgeprompt.base.mapped import map_safetensors

    files = [file for file in _files(folder) if file.suffix == ".safetensors"]
    mapped = {name: tensor for file in files for name, tensor in map_safetensors(file).items()}
    return {name: mapped.get(name, tensor) for name, tensor in tensors.items()}


def measure(folder: Path, *, mapped: bool) -> Sizes:
    """How large a folder's weights are, from their headers: nothing is mapped that may be too large to be.

    With `mapped`, matrices of the types that `map_checkpoint` maps need no memory.
    """
    whole = folder / WEIGHTS[0]
    count = largest = in_memory = 0
    for file in [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors")):
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(length, _MAX_HEADER)))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                values = math.prod(entry["shape"])
                count, largest = count + values, max(largest, values)
                if not (mapped and entry["dtype"] in MAPPED and len(entry["shape"]) == 2):
                    in_memory += values
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return Sizes(0)  # damaged: reading says how
    if count:
        return Sizes(count, largest, in_memory)
    count = sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin")) // 4
    return Sizes(count, in_memory=count)


def is_float(tensor: Any) -> bool:
    """Whether a tensor of `read_checkpoint` holds floats of a kind that computes as it is."""
    if hasattr(tensor, "get_dtype"):
        return tensor.get_dtype() in _FLOATS
    return bool(tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Its shape, unread."""
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


def _files(folder: Path) -> list[Path]:
    """The files that `read_checkpoint` read."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / file for file in sorted(set(read_json(index)["weight_map"].values()))]
    return []


def _read_shards(folder: Path, index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{str(index)!r} has no weight_map of tensor names to files")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise SourceError(f"{str(index)!r} names {outside[0]!r}, which is no file beside it")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(files)} shards that {index.name} names are not in {str(folder)!r}: "
            f"{', '.join(missing[:4])}; download the model again"
        )
    tensors = _read_files(folder / name for name in files)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise SourceError(
            f"{index.name} in {str(folder)!r} names {len(absent)} tensors that its shards do not hold: "
            f"{', '.join(absent[:3])}; download the model again"
        )
    return tensors


def _read_files(files: Iterable[Path]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in files:
        check_contents(file)
        found = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise SourceError(
                f"{str(file)!r} holds {twice[0]!r}, which another shard has too; download the model again"
            )
        tensors |= found
    return tensors


def _safetensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(file, framework="pt")
        written = (opened.metadata() or {}).get("format")
        if tool := _TRANSPOSED.get(written or ""):
            raise SourceError(
                f"{str(file)!r} is of {tool} (format {written!r}), which stores matrices the other way around: "
                "save the model again with transformers in PyTorch"
            )
        return {name: opened.get_slice(name) for name in list(opened.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(
            f"{str(file)!r} is cut short or no safetensors file ({one_line(error)}); download it again"
        ) from error


def _pickled(file: Path) -> dict[str, Any]:
    import pickle
    import zipfile

    import torch

    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise SourceError(
                f"{str(file)!r} holds pickled objects beside its tensors, and edgeprompt runs no code from a file; "
                "save the model again with save_pretrained"
            ) from error
        raise SourceError(f"{str(file)!r} is no PyTorch file; download it again") from error
    except Exception as error:  # a file of foreign bytes: torch and pickle raise nearly anything
        raise SourceError(
            f"{str(file)!r} is cut short or no PyTorch file ({one_line(error)}); download it again"
        ) from error
    while isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]  # a trainer's checkpoint
    if not isinstance(data, dict) or not data:
        raise SourceError(f"{str(file)!r} holds {type(data).__name__}, tensors by name are needed")
    other = next((name for name, value in data.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise SourceError(
            f"{str(file)!r} holds {type(data[other]).__name__} under {other!r}, tensors by name are needed; save the "
            "model again with save_pretrained"
        )
    return {str(name): value for name, value in data.items()}
