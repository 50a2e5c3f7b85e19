"""A base whose large matrices stay in its files: mapped, in the type that they are stored in, computed with in float32.

What a matrix is used for takes a float32 copy of it, or of some of its rows, and lets it go again. So a base of any
size can be exported and compared with its package in little memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy.typing as npt
import torch

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FOLDED = 1 << 19
"""Values of a matrix that no tracer computes with: torch.onnx folds constants of up to 512 x 512 values."""
_CHUNK_VALUES = 1 << 24
"""Most values of a matrix that are in float32 at a time."""
_MAPS: WeakValueDictionary[int, _Map] = WeakValueDictionary()
"""Address -> the mapped file that begins there."""


class _Map:
    """A file in memory, as far as the system keeps it there."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        with path.open("r+b" if writable else "rb") as file:
            # Private: should anybody write to a tensor, the file of a base stays as it is.
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
            self.pages = mmap.mmap(file.fileno(), 0, access=access)
        self.bytes = torch.frombuffer(self.pages, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        _MAPS[self.address] = self


def map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that safetensors has read the header of already; those of other types are left out."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    mapped = _Map(path)
    found = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry.get("dtype"))
        begin, end = (8 + length + at for at in entry.get("data_offsets", (0, 0)))
        if dtype is None or begin == end or begin % dtype.itemsize:
            continue
        tensor = mapped.bytes[begin:end].view(dtype).view(entry["shape"])
        tensor.edgeprompt_map = mapped  # type: ignore[attr-defined]  # lives as long as the tensor
        found[name] = tensor
    return found


def release(tensor: torch.Tensor) -> None:
    """Let the system take a mapped tensor's pages back; its file still has them. Others stay as they are."""
    mapped = _MAPS.get(tensor.untyped_storage().data_ptr())
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = tensor.data_ptr() - mapped.address
    start = begin + -begin % mmap.PAGESIZE
    length = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        mapped.pages.madvise(mmap.MADV_DONTNEED, start, length)


class Spill:
    """A file of float32 tensors, which is gone when they are; a context manager for as long as it is filled."""

    def __init__(self, folder: Path, values: Sequence[int]) -> None:
        """`values`: how many each tensor has that will come.

        Raises:
            OSError: the disk is full.
        """
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".spill") as file:
            size = 4 * sum(values)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a hole that cannot be filled later would kill the process
            else:
                for _ in range(0, size, 1 << 20):
                    file.write(bytes(1 << 20))
                file.flush()
            self.map = _Map(Path(file.name), writable=True)
        self._end = 0

    def put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """The array, on disk from here on; what is no matrix stays in memory."""
        tensor = torch.from_numpy(array)
        if not _is_matrix(tensor) or self._end + tensor.nbytes > len(self.map.pages):
            return tensor
        stored = self.map.bytes[self._end : self._end + tensor.nbytes].view(torch.float32).view(tensor.shape)
        stored.copy_(tensor)
        self._end += tensor.nbytes
        release(stored)
        return stored


def own(model: Any, maps: Iterable[_Map | None]) -> None:
    """Keep maps, and so the way to release their pages, for as long as a model lives."""
    model.__dict__["_edgeprompt_maps"] = tuple({id(one): one for one in maps if one is not None}.values())


class StandIns:
    """Takes the place of mapped matrices while a model is made, so that nobody reads or copies them."""

    def __init__(self) -> None:
        self._mapped: dict[int, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []

    def instead(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors, with one that takes no memory in place of every matrix that is mapped."""
        return {name: self._stand_in(tensor) if _is_matrix(tensor) else tensor for name, tensor in tensors.items()}

    def settle(self, model: Any, unexpected: set[str], tensors: Mapping[str, Any]) -> bool:
        """Put the mapped matrices into the model; False where it made something else of one of them."""
        found: dict[int, torch.nn.Parameter] = {}
        places = []
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.data_ptr() in self._mapped:
                    places.append((module, name, parameter))
        for module, name, parameter in places:
            key = parameter.data_ptr()
            mapped = self._mapped[key]
            if mapped.shape != parameter.shape or not parameter.is_contiguous():
                return False
            plain = mapped.dtype == torch.float32
            if key not in found:
                streams = plain or all(_computes(other) for other, _, one in places if one.data_ptr() == key)
                found[key] = torch.nn.Parameter(mapped if streams else mapped.float(), requires_grad=False)
            module._parameters[name] = found[key]
            if found[key].dtype != torch.float32:
                module.forward = _Streamed(module)
        own(model, (getattr(tensor, "edgeprompt_map", None) for tensor in tensors.values()))
        settled = {self._mapped[key].data_ptr() for key in found}
        matrices = {name: tensor for name, tensor in tensors.items() if _is_matrix(tensor) and name not in unexpected}
        return all(tensor.data_ptr() in settled for tensor in matrices.values())

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        made = reserve(tuple(tensor.shape))
        self._mapped[made.data_ptr()] = tensor
        self._kept.append(made)
        return made


def reserve(shape: tuple[int, ...]) -> torch.Tensor:
    """float32 zeros that take no memory until somebody writes to them."""
    count = 1
    for size in shape:
        count *= size
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, 4 * count, flags=flags), dtype=torch.float32).view(shape)


def is_streamed(parameter: torch.Tensor) -> bool:
    """Whether a parameter lies in its file in another type than float32."""
    return parameter.dtype != torch.float32


@contextlib.contextmanager
def stand_ins(model: Any, *, least: int = FOLDED) -> Iterator[dict[int, torch.Tensor]]:
    """Give a model float32 parameters for those that are streamed, for a tracer that looks at shapes.

    Those of at least `least` values are zeros that take no memory; smaller ones are copies, which tracers may compute
    with.

    Yields:
        Address of what takes no memory -> the parameter that it stands for.
    """
    replaced: dict[int, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
    places = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_streamed(parameter):
                if id(parameter) not in replaced:
                    large = parameter.numel() >= least
                    made = reserve(tuple(parameter.shape)) if large else parameter.detach().float()
                    replaced[id(parameter)] = (parameter, torch.nn.Parameter(made, requires_grad=False))
                places.append((module, name, parameter))
                module._parameters[name] = replaced[id(parameter)][1]
    try:
        yield {made.data_ptr(): parameter for parameter, made in replaced.values() if parameter.numel() >= least}
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


class _Streamed:
    """A module's forward, with its weight in float32 for as long as it computes."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        module = self.module
        weight = module._parameters["weight"]
        if not is_streamed(weight):  # a stand-in, which a tracer looks at
            traced: torch.Tensor = type(module).forward(module, given)
            return traced
        if isinstance(module, torch.nn.Embedding):
            ids, places = torch.unique(given, return_inverse=True)
            padding, module.padding_idx = module.padding_idx, None  # of the gradient alone; it counts in all the rows
            try:
                out = self._with(weight[ids].float(), places)
            finally:
                module.padding_idx = padding
        elif given.requires_grad and torch.is_grad_enabled():
            turned = type(module) is not torch.nn.Linear  # transformers' Conv1D
            out = cast(torch.Tensor, _Product.apply(given, weight.T if turned else weight))  # type: ignore[no-untyped-call]
            return out if module.bias is None else out + module.bias
        elif type(module) is torch.nn.Linear and weight.numel() > _CHUNK_VALUES:
            out = _linear(given, weight, module.bias)
        else:
            out = self._with(weight.float(), given)
        release(weight)
        return out

    def _with(self, weight: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        module = self.module
        before = module._parameters["weight"]
        module._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        try:
            out: torch.Tensor = type(module).forward(module, given)
        finally:
            module._parameters["weight"] = before
        return out


class _Product(torch.autograd.Function):
    """`given @ weight.T` whose backward pass reads the weight again, so that no float32 copy waits for it."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, given.dtype
        return _linear(given, weight, None)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, weight = gradients[0].float(), ctx.weight
        out = gradient.new_zeros((*gradient.shape[:-1], weight.shape[1]))
        step = max(1, _CHUNK_VALUES // weight.shape[1])
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            out += gradient[..., part] @ weight[part].float()
            release(weight[part])
        return out.to(ctx.dtype), None


def _linear(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = given.new_empty((*given.shape[:-1], len(weight)))
    step = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        out[..., part] = torch.nn.functional.linear(given, weight[part].float(), None if bias is None else bias[part])
        release(weight[part])
    return out


def _computes(module: Any) -> bool:
    """Whether a module's forward is known to take one operand, and rows of an embedding by plain ids."""
    from transformers.pytorch_utils import Conv1D

    kind = type(module)
    scaled = isinstance(module, torch.nn.Embedding) and kind.__name__.endswith("ScaledWordEmbedding")  # Gemma's
    return scaled or kind in (torch.nn.Embedding, torch.nn.Linear, Conv1D)


def _is_matrix(tensor: Any) -> bool:
    # Small ones too: matrices that exporters join must be of one type.
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dim() == 2
        and tensor.numel() > 0
        and tensor.dtype in _DTYPES.values()
    )
