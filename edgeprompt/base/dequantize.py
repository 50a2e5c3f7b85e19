"""Puts a package's own quantised weights back into the PyTorch model, so that a prompt is tuned on what is deployed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from edgeprompt import names
from edgeprompt.base.blockwise import unpack_blocks
from edgeprompt.base.fingerprint import base_fingerprint
from edgeprompt.base.graph_file import read_graph
from edgeprompt.errors import BaseMismatchError, PackageError, UnsupportedError
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Base

_LOG = logging.getLogger("edgeprompt")
_FARTHEST = 0.5
"""How far a quantised matrix may be from its float one, as a share of its norm; 4 bits take about 0.1."""
_TAKEN: WeakKeyDictionary[Any, Base] = WeakKeyDictionary()
"""Models that hold a package's weights, and what they were before."""
WEIGHTS = "weights"
"""Key of the weight records in the manifest's `extra`."""


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_package_weights` changed."""

    precision: str
    weights_hash: str
    parameters: tuple[str, ...]
    """Parameters that now hold the package's values."""
    largest_change: float
    """Largest absolute change of any weight."""


@dataclass(frozen=True)
class Closeness:
    """How far PyTorch is from the graph on some inputs: differences of last-position logits."""

    max_difference: float
    mean_difference: float
    logit_scale: float
    top1_agreement: float


def load_package_weights(model: Any, package: str | os.PathLike[str]) -> LoadedWeights:
    """Overwrite a model's weights with those of a package, dequantised.

    What then still differs from the graph is the rounding of activations (int8 inside the kernels).

    Args:
        model: The package's base as a transformers model (PEFT around it is fine), on any device.
        package: The package's folder.

    Raises:
        BaseMismatchError: the model is another base than the package's.
        PackageError: the package is broken.
        UnsupportedError: the package's exporter did not note where the weights went.
    """
    opened = open_package(package)
    manifest = opened.manifest
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    # A model that holds a package's weights already is still that base.
    found = _TAKEN.setdefault(model, Base("the model", base_fingerprint(model)))
    if not found.matches(manifest.base):
        raise BaseMismatchError(
            f"package {str(package)!r} was exported from {manifest.base.name!r} ({manifest.base.brief}), the "
            f"model has {found.brief}{found.apart(manifest.base)}"
        )
    weaker = manifest.base.weaker(found)
    if weaker:
        _LOG.warning("note: package %r: %s", str(package), weaker)
    records: Sequence[Mapping[str, Any]] = manifest.extra.get(WEIGHTS, ())
    if not records and manifest.precision in ("int8", "int4", "gguf"):
        raise UnsupportedError(
            f"package {str(package)!r} does not say where its weights went; export it with --route genai or torch"
        )
    parameters = dict(model.named_parameters())
    largest, changed = 0.0, []
    for key in manifest.graphs:
        initializers = read_graph(opened.graph(key)).graph.initializers
        for record in records:
            if record["codes"] not in initializers:
                continue
            weight, row = dequantize_record(record, initializers), 0
            for name, rows, transposed in record["pieces"]:
                if name not in parameters:
                    raise PackageError(f"the package's weight {record['codes']!r} is the model's {name!r}: no such")
                piece = weight[row : row + rows]
                target = parameters[name].data
                value = (piece.T if transposed else piece).to(target.device, target.dtype)
                difference = value - target
                if float(difference.norm()) > _FARTHEST * float(target.norm()):
                    raise BaseMismatchError(
                        f"package {str(package)!r} holds other weights than the model: {name} differs by "
                        f"{float(difference.norm() / target.norm()):.2f} of its size, quantisation by at most "
                        f"{_FARTHEST}; export the model again"
                    )
                largest = max(largest, float(difference.abs().max()))
                target.copy_(value)
                changed.append(name)
                row += rows
    if manifest.precision == "fp16":
        largest, changed = _round_to_half(parameters)
    return LoadedWeights(manifest.precision, manifest.weights_hash, tuple(changed), largest)


def check_closeness(
    model: Any, package: str | os.PathLike[str], sequences: Sequence[Sequence[int]], prompt_rows: Any = None
) -> Closeness:
    """Compare a decoder in PyTorch with the package's graph on token ids, each sequence alone.

    Args:
        model: The model, usually after `load_package_weights`.
        package: The package's folder.
        sequences: Token ids; ids at or above vocab_size index `prompt_rows`.
        prompt_rows: float32 [rows, hidden_size], None for none.

    Raises:
        UnsupportedError: the package is no decoder.
    """
    from edgeprompt.base.decoder_graph import DecoderGraph, reference_logits

    opened = open_package(package)
    if opened.manifest.architecture != names.DECODER_ONLY:
        raise UnsupportedError(f"closeness is measured on {names.DECODER_ONLY} packages")
    graph = DecoderGraph(opened.path, opened.manifest)
    hidden = opened.manifest.geometry.hidden_size
    rows = np.zeros((1, hidden), np.float32) if prompt_rows is None else np.asarray(prompt_rows, np.float32)
    differences, scale, agree = [], 0.0, []
    for sequence in sequences:
        ids = np.asarray(sequence, np.int64)
        got, _ = graph.run(ids[None], np.ones((1, len(ids)), np.int64), graph.empty_past(), rows)
        want = reference_logits(model, ids, rows)
        differences.append(np.abs(got[0] - want))
        scale = max(scale, float(np.abs(want).max()))
        agree.append(got[0].argmax() == want.argmax())
    return Closeness(
        max(float(d.max()) for d in differences),
        float(np.mean([d.mean() for d in differences])),
        scale,
        float(np.mean(agree)),
    )


def dequantize_record(
    record: Mapping[str, Any], initializers: Mapping[str, ir.Value], rows: slice = slice(None)
) -> torch.Tensor:
    """The float32 weight [out_features, in_features] that a `exporters.quantize.graph.WeightRecord` describes.

    `rows` takes some of its rows alone.
    """
    columns_first = record["layout"] == "columns"
    codes = _array(initializers, record["codes"], (slice(None), rows) if columns_first else (rows,))
    scales = _array(initializers, record["scales"], (rows,))
    zeros = _array(initializers, record["zero_points"], (rows,)) if record["zero_points"] else None
    if columns_first:
        middle = np.float32(128 if codes.dtype == np.uint8 else 0) if zeros is None else zeros.astype(np.float32)
        return _without_factors(
            torch.from_numpy(((codes.astype(np.float32) - middle) * scales).T), record, initializers
        )
    if record["layout"] != "blocks":
        raise PackageError(f"unknown weight layout {record['layout']!r}; known: blocks, columns")
    blocks = unpack_blocks(codes, scales, zeros, columns=record["columns"], bits=record["bits"], block=record["block"])
    weight = blocks.dequantize()
    if not record["offsets"]:
        return _without_factors(weight, record, initializers)
    columns = record["columns"] - record["offsets"]
    offsets = weight[:, columns : columns + columns // record["block"]]
    return weight[:, :columns] + offsets.repeat_interleave(record["block"], dim=1)


def _without_factors(
    weight: torch.Tensor, record: Mapping[str, Any], initializers: Mapping[str, ir.Value]
) -> torch.Tensor:
    factors = read_factors(record, initializers)
    return weight if factors is None else weight / factors


def read_scales(
    record: Mapping[str, Any], initializers: Mapping[str, ir.Value], rows: slice = slice(None)
) -> npt.NDArray[np.float32]:
    """The scales [out_features] of a weight with one scale for each row (layout "columns"), or some of them."""
    scales: npt.NDArray[np.float32] = _array(initializers, record["scales"], (rows,)).astype(np.float32).reshape(-1)
    return scales


def read_steps(
    record: Mapping[str, Any], initializers: Mapping[str, ir.Value], rows: slice = slice(None)
) -> npt.NDArray[np.float32]:
    """The scales [out_features, blocks] of a blockwise weight, or of some of its rows."""
    scales = _array(initializers, record["scales"], (rows,)).astype(np.float32)
    return scales.reshape(len(scales), -1)


def read_factors(record: Mapping[str, Any], initializers: Mapping[str, ir.Value]) -> torch.Tensor | None:
    """Powers of two that the base's columns were multiplied by before they were rounded; None: by nothing.

    Raises:
        PackageError: they are something else.
    """
    if not record.get("factors"):
        return None
    factors = torch.from_numpy(_array(initializers, record["factors"], (slice(None),)).astype(np.float32))
    mantissas, _ = torch.frexp(factors)
    if not bool((mantissas == 0.5).all()):
        raise PackageError(f"the factors {record['factors']!r} are not powers of two; export the base again")
    return factors


def _array(initializers: Mapping[str, ir.Value], name: str, part: tuple[slice, ...]) -> npt.NDArray[Any]:
    if name not in initializers or initializers[name].const_value is None:
        raise PackageError(f"the graph lacks the initialiser {name!r} that the manifest names; export the base again")
    array: npt.NDArray[Any] = np.array(initializers[name].const_value.numpy()[part])
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _round_to_half(parameters: Mapping[str, torch.nn.Parameter]) -> tuple[float, list[str]]:
    largest, changed = 0.0, []
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            half = parameter.data.half().to(parameter.dtype)
            largest = max(largest, float((half - parameter.data).abs().max()))
            parameter.data.copy_(half)
            changed.append(name)
    return largest, changed
