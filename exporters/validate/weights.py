"""Proves that the weights which a package stores are its base's: one broken matrix shows here, however small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeprompt.base.dequantize import WEIGHTS, dequantize_record, read_factors, read_scales, read_steps
from edgeprompt.base.mapped import release
from edgeprompt.errors import ValidationError
from edgeprompt.package.manifest import Manifest
from exporters.graft.linears import WeightIndex

LIMITS = {4: (0.25, 0.8), 8: (0.04, 0.4)}
"""Bits -> largest error allowed of a matrix, and of each run of `RUN` weights of a row, relative to its own size."""
RUN = 32
_NEAREST = 0.6
"""Steps that rounding to the nearest explains, the scale's own fit included."""
_CHUNK = 1 << 22
"""Weights that are compared at a time."""


def check_weights(model: Any, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Compare every quantised matrix, read back from the package, with the model's parameters.

    Returns:
        How many matrices, and the largest error of one; nothing where the manifest does not say where weights went.

    Raises:
        ValidationError: a matrix, or a part of one, is not the base's.
    """
    records = manifest.extra.get(WEIGHTS) or []
    rest = _Rest(model) if records else None
    parameters = dict(model.named_parameters())
    errors: dict[str, float] = {}
    for key, graph in manifest.graphs.items():
        mine = records.get(key, []) if isinstance(records, Mapping) else records
        initializers = ir.load(folder / graph.file).graph.initializers if records else {}
        for record in mine:
            if record["codes"] in initializers:
                errors[f"{record['codes']} ({key})"] = _compare(record, initializers, parameters)
                for name in (record["codes"], record["scales"], record["zero_points"], record.get("factors")):
                    stored = initializers[name].const_value if name else None
                    if isinstance(stored, ir.ExternalTensor):
                        stored.release()  # each maps the whole file
        if rest is not None:
            rest.find(initializers, mine)
    if not errors:
        return {}
    if rest is not None:
        rest.check()
    worst = max(errors, key=lambda name: errors[name])
    return {"matrices": len(errors), "largest_error": round(errors[worst], 5), "largest_error_in": worst}


def _compare(record: Mapping[str, Any], initializers: Mapping[str, Any], parameters: Mapping[str, Any]) -> float:
    whole, part = LIMITS[record["bits"]]
    factors = read_factors(record, initializers)
    lost = size = 0.0
    for start, want in _wanted(record["pieces"], parameters):
        got = dequantize_record(record, initializers, slice(start, start + len(want)))
        if factors is not None:  # what was rounded is compared: powers of two change no digit
            got, want = got * factors, want * factors
        columns = record["layout"] == "columns"
        if columns:
            _check_rounding(record, initializers, start, got, want)
        runs = -want.shape[1] % RUN
        got, want = (torch.nn.functional.pad(side, (0, runs)).reshape(len(side), -1, RUN) for side in (got, want))
        error, power = (got - want).square_().sum(2), want.square().sum(2)
        # A run far smaller than its row's others lies below their rounding.
        power_of_row = power.mean(1, keepdim=True)
        share = error / torch.maximum(power, 0.05 * power_of_row).clamp(min=1e-30)
        if not columns and record["block"] > RUN:
            # Beside a large weight of its block, what lies near zero is rounded to it.
            steps = torch.from_numpy(read_steps(record, initializers, slice(start, start + len(want))))
            steps = steps.repeat_interleave(record["block"] // RUN, dim=1)[:, : share.shape[1]]
            share = torch.where(error <= RUN * (_NEAREST * steps).square(), 0.0, share)
        if not columns and not bool((share <= part**2).all()):
            row = start + int((share.nan_to_num(torch.inf) > part**2).any(1).nonzero()[0, 0])
            raise ValidationError(
                f"the package's weight {record['codes']!r} is not the base's {record['pieces'][0][0]!r}: row {row} has "
                f"a part that differs by {float(share[row - start].max()) ** 0.5:.2f} of its size, {record['bits']} "
                f"bits explain at most {part}"
            )
        lost, size = lost + float(error.sum()), size + float(power.sum())
    relative: float = (lost / max(size, 1e-30)) ** 0.5
    if not relative <= whole:
        raise ValidationError(
            f"the package's weight {record['codes']!r} differs from the base's {record['pieces'][0][0]!r} by "
            f"{relative:.2f} of its size, {record['bits']} bits explain at most {whole}"
        )
    return relative


def _check_rounding(
    record: Mapping[str, Any], initializers: Mapping[str, Any], start: int, got: torch.Tensor, want: torch.Tensor
) -> None:
    """One scale for a row: every weight is rounded to the nearest step, so none is further than half of one."""
    steps = torch.from_numpy(read_scales(record, initializers, slice(start, start + len(want))))
    right = (got - want).abs() <= 0.51 * steps[:, None]
    if not bool(right.all()):
        row, column = (~right).nonzero()[0].tolist()
        raise ValidationError(
            f"the package's weight {record['codes']!r} is not the base's {record['pieces'][0][0]!r}: row "
            f"{start + row}, column {column} is {float(got[row, column]):.4g} for {float(want[row, column]):.4g}, in "
            f"steps of {float(steps[row]):.2g}; no package was written"
        )


def _wanted(
    pieces: Sequence[tuple[str, int, bool]], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The base's rows [rows, columns], a few at a time, and where they start in the stored matrix."""
    row = 0
    for name, rows, transposed in pieces:
        if name not in parameters:
            raise ValidationError(f"the package names a weight {name!r} that the base does not have")
        matrix = parameters[name].detach()
        matrix = matrix.T if transposed else matrix
        step = max(1, _CHUNK // matrix.shape[1])
        for start in range(0, rows, step):
            part = matrix[start : min(start + step, rows)]
            yield row + start, part.float()
            release(part)
        row += rows


class _Rest:
    """Parameters that are not quantised: norms, biases, tables, small matrices. A package holds them as they are."""

    def __init__(self, model: Any) -> None:
        self._left = {name: value.detach() for name, value in model.named_parameters()}
        self._matrices = WeightIndex(model)

    def find(self, initializers: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Take off what the initialisers of a graph hold, or its records say that they hold."""
        for record in records:
            if record["codes"] in initializers:
                for name, _, _ in record["pieces"]:
                    self._left.pop(name, None)
        stored = [value.const_value for value in initializers.values() if value.const_value is not None]
        for tensor in stored:
            if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or tensor.size < 2:
                continue
            found = torch.from_numpy(np.array(tensor.numpy()))
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
            if found.dim() == 2:
                self._take_matrices(found)
            for name in [name for name, value in self._left.items() if _holds(found, value)]:
                del self._left[name]

    def _take_matrices(self, found: torch.Tensor) -> None:
        for matrix in (found, found.T):
            for name, _, _ in self._matrices.pieces(matrix.float()):
                self._left.pop(name, None)

    def check(self) -> None:
        """Refuse a package that lacks one.

        Raises:
            ValidationError: names it.
        """
        # Zeros are left out of a graph: adding them changes nothing.
        if left := [name for name, value in self._left.items() if value.numel() > 1 and bool(value.any())]:
            more = f", nor of {len(left) - 1} others" if len(left) > 1 else ""
            raise ValidationError(f"the package holds no copy of the base's {left[0]!r}{more}, which is not quantised")


def _holds(found: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether an initialiser is a parameter, 1 more than it (Gemma's norms), or several that begin with it."""
    count = value.numel()
    if found.numel() < count or (found.numel() > count and (value.dim() > 1 or found.dim() > 1)):
        return False
    flat = found.reshape(-1)
    for form in (value, value.float() + 1):
        want = form.reshape(-1).to(found.dtype)
        for at in (flat[: 1 + len(flat) - count] == want[0]).nonzero().ravel().tolist():
            if torch.equal(flat[at : at + count], want):
                return True
    return False
