"""Finds the matrix products with constant weights in a graph, and whose parameters those weights are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch


@dataclass(frozen=True)
class Linear:
    """A MatMul or Gemm whose second operand is constant."""

    node: ir.Node
    value: ir.Value
    """The weight's initialiser."""
    transposed: bool
    """Whether the initialiser is stored [out_features, in_features]."""

    def weight(self) -> torch.Tensor:
        """The weight as [out_features, in_features]; shares the initialiser's memory."""
        matrix = initializer_tensor(self.value)
        return matrix if self.transposed else matrix.T

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
                if fits and torch.equal(weight[row : row + rows], matrix):
                    found.append((name, rows, transposed))
                    row += rows
                    break
            else:
                return []
        return found


def _row_key(row: torch.Tensor) -> bytes:
    return row[:64].contiguous().numpy().tobytes()
