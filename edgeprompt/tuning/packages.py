"""Several packages of one base: their weights take turns in the one model that is in memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch

from edgeprompt.package.folder import Package

TURN = 4
"""Steps in a row on the same weights."""


class _Stored:
    """Values of some parameters in a temporary file, as float32, read one by one."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as this object)
        weakref.finalize(self, self._file.close)
        self._places: dict[str, int] = {}
        for name, parameter in parameters.items():
            self._places[name] = self._file.tell()
            self._file.write(parameter.detach().float().cpu().numpy().tobytes())
        self._file.flush()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def restore(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Put a parameter's value back."""
        self._file.seek(self._places[name])
        values = np.fromfile(self._file, np.float32, parameter.numel()).reshape(tuple(parameter.shape))
        parameter.data.copy_(torch.from_numpy(values))


class PackageWeights:
    """The weights of packages, which `use` puts into the model.

    Those of several lie in temporary files: memory holds the model once.
    """

    def __init__(self, model: Any, packages: Sequence[Package]) -> None:
        """Read all packages; the model ends with the weights of the first.

        Raises:
            BaseMismatchError: a package is of another base.
            PackageError: a package is broken.
        """
        from edgeprompt.base.dequantize import load_package_weights

        self.packages = tuple(packages)
        self._parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self._stored: list[_Stored] = []
        self._changed: list[str] = []
        self._current: int | None = 0
        if len(self.packages) == 1:
            load_package_weights(model, self.packages[0].path)
        if len(self.packages) < 2:
            return
        self._own = _Stored(self._parameters)
        changed: set[str] = set()
        for package in self.packages:
            for name in sorted(changed):
                self._own.restore(name, self._parameters[name])
            mine = load_package_weights(model, package.path).parameters
            changed.update(mine)
            self._stored.append(_Stored({name: self._parameters[name] for name in mine}))
        self._changed = sorted(changed)
        self._current = None
        self.use(0)

    def __len__(self) -> int:
        return len(self.packages)

    def use(self, index: int) -> None:
        """Put a package's weights into the model."""
        if index == self._current:
            return
        stored = self._stored[index]
        for name in self._changed:
            (stored if name in stored else self._own).restore(name, self._parameters[name])
        self._current = index

    def at(self, step: int) -> int:
        """Which package's weights a training step sees."""
        return step // TURN % max(1, len(self))
