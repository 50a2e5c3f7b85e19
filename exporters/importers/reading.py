"""Foreign files, read without running anything in them."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import MissingDependencyError, SourceError, UnsupportedError
from edgeprompt.package import strict_json
from edgeprompt.package.files import open_regular, read_regular

Array = npt.NDArray[Any]
Keep = Callable[[str], bool]

MAX_JSON_BYTES = 16 << 20
MAX_PROMPT_BYTES = 1 << 30
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
"""What trainers (OpenPrompt's, Lightning, DeepSpeed, plain loops) call the part that holds the weights."""
_TRAINING = (
    *("optimizer", "optimizers", "optimizer_state", "optimizer_states", "optimizer_state_dict", "optim", "optim_state"),
    *(
        "scheduler",
        "schedulers",
        "scheduler_state_dict",
        "lr_scheduler",
        "lr_schedulers",
        "scaler",
        "scaler_state_dict",
    ),
    *("callbacks", "loops", "rng_state", "rng_states", "random_rng_state", "amp", "grad_scaler", "metrics"),
)
"""What they keep beside it, for going on."""
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AROUND_ALL = ("base_model.model.", "model.", "state_dict.", "net.", "network.")
"""In front of every name of a checkpoint: the attribute of whatever held the model."""


def read_json(file: Path) -> dict[str, Any]:
    """A foreign JSON object; unknown keys are welcome.

    Raises:
        SourceError: missing, no regular file, too large, or no JSON object.
    """
    try:
        data = json.loads(read_regular(file, MAX_JSON_BYTES), object_pairs_hook=strict_json.consistent)
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{str(file)!r} must hold a JSON object, found {type(data).__name__}")
    return data


@dataclass(frozen=True)
class Checkpoint:
    """A file of named tensors. Names are plain: without what wrappers such as DistributedDataParallel put in front."""

    file: Path
    names: tuple[str, ...]
    """Of every tensor in the file."""
    tensors: Mapping[str, Array]
    """Those that were read."""
    stored: Mapping[str, str]
    """Plain name -> the name in the file."""

    def each(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Torch tensors by plain name, one after another, so that a whole model is never in memory."""
        if self.file.suffix != ".safetensors":
            state = named_tensors(load_pickle(self.file), self.file)
            for name in names:
                yield name, state[self.stored[name]].detach()
            return
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:
            for name in names:
                yield name, opened.get_tensor(self.stored[name])

    def account(self, harmless: Keep, tool: str) -> None:
        """Refuse a file with tensors that were neither read nor are known to be `harmless`.

        Raises:
            SourceError: names them.
        """
        unknown = sorted(name for name in self.names if name not in self.tensors and not harmless(name))
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise SourceError(
                f"{self.file.name} also holds {', '.join(unknown[:3])}{more}, which no {tool} prompt has: what was "
                "trained there would be lost; rename the tensors as the tool names them, or save the file without them"
            )


def read_checkpoint(file: Path, keep: Keep = lambda name: True) -> Checkpoint:
    """Tensors of a `.safetensors` file or of a PyTorch file whose plain name `keep` accepts; bfloat16 becomes float32.

    Only the tensors kept are read, so that a checkpoint of a whole model costs what its prompt costs.

    Raises:
        SourceError: missing, broken, not a mapping of names to float tensors, not finite, or two names that are one.
        UnsupportedError: a pickle that holds more than tensors.
    """
    if file.suffix == ".safetensors":
        plain = plain_names(_safetensors_names(file), file)
        found = _from_safetensors(file, lambda name: keep(plain[name]))
    else:
        state = load_pickle(file)
        if not isinstance(state, Mapping):
            raise SourceError(f"{str(file)!r} holds a {type(state).__name__}, expected named tensors (a state_dict)")
        tensors = named_tensors(state, file)
        plain = plain_names(tuple(tensors), file)
        found = {name: as_array(value, name) for name, value in tensors.items() if keep(plain[name])}
    stored = {short: name for name, short in plain.items()}
    return Checkpoint(file, tuple(stored), {plain[name]: tensor for name, tensor in found.items()}, stored)


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
        return Contents(tensors=tuple(plain_names(_safetensors_names(source), source).values()))
    if source.suffix == ".npy":
        return Contents(rank=load_npy(source).ndim)
    if source.suffix in PICKLES:
        state = load_pickle(source)
        if isinstance(state, Mapping):
            return Contents(tensors=tuple(plain_names(tuple(named_tensors(state, source)), source).values()))
        return Contents(rank=getattr(state, "ndim", 0))
    return Contents()


def check_file(file: Path) -> None:
    """Refuse what is no file with contents, before a library opens it.

    Raises:
        SourceError: missing, a folder, pipe, socket or device, empty, or a Git LFS pointer.
    """
    try:
        with open_regular(file) as opened:
            start = opened.read(64)
    except FileNotFoundError as error:
        raise SourceError(f"nothing is at {str(file)!r}; give a prompt's file or folder") from error
    except OSError as error:
        raise SourceError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    if not start:
        raise SourceError(f"{str(file)!r} is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise SourceError(f"{str(file)!r} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")


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
    _check_archive(file)
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
            if what.isdigit():  # an opcode, not a class
                raise UnsupportedError(
                    f"{str(file)!r} is a pickle that torch.save did not write, and loading it may run its code; load "
                    "it where you trust it and save its tensors with safetensors, then convert that"
                ) from error
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
    behind = file.stat().st_size - getattr(array, "offset", 0) - array.nbytes
    if isinstance(array, np.memmap) and behind:
        raise SourceError(f"{str(file)!r} holds {behind} bytes behind its array; give a file of one array")
    return _checked(file.name, np.asarray(array))


def _check_archive(file: Path) -> None:
    """Refuse a PyTorch archive that grows when it is read; torch.save compresses nothing.

    Raises:
        SourceError: it is compressed, or its parts claim more bytes than it has.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # the format before torch 1.6, or broken: torch says how
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
        sum(part.file_size for part in parts) > file.stat().st_size
    ):
        raise SourceError(f"{str(file)!r} is a compressed archive, which torch.save does not write; save it again")


def as_array(tensor: Any, name: str) -> Array:
    """A torch tensor as numpy; bfloat16 and float64 become float32.

    Raises:
        SourceError: sparse, quantised, without data, or not finite.
    """
    import torch

    if tensor.is_sparse or tensor.is_quantized or tensor.is_meta or tensor.layout is not torch.strided:
        raise SourceError(f"tensor {name!r} is {tensor.layout} {tensor.dtype}; a dense float tensor is needed")
    _check_size(name, tensor.numel() * tensor.element_size())
    plain = tensor.detach()
    return _checked(name, (plain.float() if plain.dtype in (torch.bfloat16, torch.float64) else plain).numpy())


def named_tensors(state: Mapping[Any, Any], file: Path) -> dict[str, Any]:
    """The torch tensors of a checkpoint, names joined by dots.

    What a trainer keeps beside the weights (`{"state_dict": ..., "optimizer": ...}`) is left out, and so is the name of
    the part that holds them.

    Raises:
        SourceError: nested too deeply, two tensors of one name, or a name that cannot be printed.
    """
    found: dict[str, Any] = {}
    for name, tensor in _walk(_unwrapped(state), "", file, set()):
        if name in found:
            raise SourceError(f"{str(file)!r} has two tensors called {name!r}")
        found[name] = tensor
    _printable(found, file)
    return found


def _unwrapped(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The weights on the top level, with whatever else is neither theirs nor a trainer's."""
    for _ in range(4):
        state = {key: value for key, value in state.items() if key not in _TRAINING or hasattr(value, "layout")}
        inner = [key for key, value in state.items() if key in _WEIGHTS and isinstance(value, Mapping)]
        if len(inner) != 1:
            break
        weights = state.pop(inner[0])
        state = {**weights, **{f"{key} beside {inner[0]}": value for key, value in state.items()}}
    return dict(state)


def _walk(state: Any, path: str, file: Path, seen: set[int]) -> Iterable[tuple[str, Any]]:
    """Every tensor with its name; a container that occurs twice is read once."""
    import torch

    if path.count(".") > 64:
        raise SourceError(f"{str(file)!r} is nested too deeply to be a checkpoint")
    for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            yield from _walk(value, name, file, seen)


def plain_names(names: Iterable[str], file: Path) -> dict[str, str]:
    """Each name without what wrappers of modules put into it (`module.`, `_orig_mod.`, `base_model.model.`, ...).

    Raises:
        SourceError: two names are the same without it.
    """
    names = tuple(names)
    plain = [_INSIDE.sub("", name) for name in names]
    while True:
        before = plain
        plain = [name.removeprefix("module.") for name in plain]
        for prefix in _AROUND_ALL:
            if plain and all(name.startswith(prefix) for name in plain):
                plain = [name.removeprefix(prefix) for name in plain]
        if plain == before:
            break
    if len(set(plain)) != len(plain):
        twice = next(name for name in plain if plain.count(name) > 1)
        raise SourceError(f"{str(file)!r} has two tensors called {twice!r} once the names of wrappers are left out")
    return dict(zip(names, plain, strict=True))


def _safetensors_names(file: Path) -> tuple[str, ...]:
    from safetensors import SafetensorError, safe_open

    check_file(file)
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
    _check_size(name, array.nbytes)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype not in (np.float16, np.float32):
        if array.dtype.kind in "iub":
            return array
        raise SourceError(f"tensor {name!r} is {array.dtype}; a float tensor is needed")
    if not np.isfinite(array).all():
        raise SourceError(f"tensor {name!r} holds NaN or infinity; the training that wrote it went wrong")
    return array


def _check_size(name: str, size: int) -> None:
    if size > MAX_PROMPT_BYTES:
        raise SourceError(f"tensor {name!r} has {size} bytes; a prompt has at most {MAX_PROMPT_BYTES}")
