"""Finds the matrix products with constant weights in a graph, and whose parameters those weights are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from edgeprompt.base.mapped import release

_CHUNK_VALUES = 1 << 22
"""Values that are compared at a time."""


@dataclass(frozen=True)
class Linear:
    """A MatMul or Gemm whose second operand is constant."""

    node: ir.Node
    value: ir.Value
    """The weight's initialiser."""
    transposed: bool
    """Whether the initialiser is stored [out_features, in_features]."""

    def weight(self) -> torch.Tensor:
        """The weight as [out_features, in_features]; shares the initialiser's memory, or is read now."""
        matrix = initializer_tensor(self.value)
        return matrix if self.transposed else matrix.T

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), of a weight that need not be read for it."""
        assert self.value.shape is not None
        first, second = (int(size) for size in self.value.shape.numpy())
        return (first, second) if self.transposed else (second, first)

    @property
    def bias(self) -> ir.Value | None:
        """Gemm's third operand."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


def initializer_tensor(value: ir.Value) -> torch.Tensor:
    """An initialiser as a torch tensor that shares its memory where it can."""
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy())


def find_linears(graph: ir.Graph) -> Iterator[Linear]:
    """All matrix products with a constant 2-D weight, in graph order."""
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            continue
        value, transposed = node.inputs[1], bool(attributes.get("transB", 0))
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Transpose":
            value, transposed = producer.inputs[0], not transposed
        if value is None or not is_constant(graph, value) or value.shape is None or len(value.shape) != 2:
            continue
        yield Linear(node, value, transposed)


def is_constant(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether a value is an initialiser with data."""
    return value.name in graph.initializers and value.const_value is not None


class WeightIndex:
    """Says which parameters of a PyTorch model a weight in a graph consists of, by comparing contents.

    Exporters rename, transpose and pack weights as they like; equal numbers say it without trusting any name.
    """

    def __init__(self, model: Any) -> None:
        self._by_row: dict[bytes, list[tuple[str, bool, torch.Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2:
                continue
            for transposed in (False, True):
                matrix = parameter.detach().T if transposed else parameter.detach()
                self._by_row.setdefault(_row_key(matrix[0]), []).append((name, transposed, matrix))

    def pieces(self, weight: torch.Tensor) -> list[tuple[str, int, bool]]:
        """Parameters that make up `weight [out_features, in_features]` from top to bottom.

        Returns:
            (parameter name, number of rows, whether PyTorch stores it the other way round), or nothing where some
            rows belong to no parameter.
        """
        found: list[tuple[str, int, bool]] = []
        row = 0
        while row < weight.shape[0]:
            for name, transposed, matrix in self._by_row.get(_row_key(weight[row]), ()):
                rows = matrix.shape[0]
                fits = matrix.shape[1] == weight.shape[1] and row + rows <= weight.shape[0]
                if fits and _equal(weight[row : row + rows], matrix):
                    found.append((name, rows, transposed))
                    row += rows
                    break
            else:
                return []
        return found


def _row_key(row: torch.Tensor) -> bytes:
    return row[:64].float().contiguous().numpy().tobytes()


def _equal(weight: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether a parameter, in whatever type it is stored, is a weight: some rows at a time."""
    step = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        part = matrix[start : start + step]
        if not torch.equal(weight[start : start + step], part.float()):
            return False
        release(part)
    return True
