"""Quantises activations row by row, where ONNX Runtime's dynamic operator takes one scale for the whole tensor.

With one scale, a row of a batch loses precision to whatever outlier its neighbours hold, and its result depends on
them. With a scale per row (per token) neither happens: what other rows hold changes no bit. It costs about a tenth of
the product's time, less where several products read one input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

_LEVELS = 127
MIDDLE = 128
"""Zero point of unsigned integers, those of activations and of unsigned weights."""
_BLOCKED_OPSET = 21
"""From here on QuantizeLinear takes a scale for each block, and a row can be one."""


def quantize_rows(model: ir.Model) -> None:
    """Replace every `DynamicQuantizeMatMul`, in place.

    ``y = (round(x / s) @ W_q) s`` with ``s`` the largest magnitude of x's row over 127. A row of zeros divides by zero,
    and whatever integers that gives are multiplied by its scale, 0.
    """
    _Rows(model).run()


class _Rows:
    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.blocked = model.opset_imports.get("", 0) >= _BLOCKED_OPSET
        self.parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """A source's integers, and the scales of its rows."""
        self.scaled: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """A product, before and after its rows' scales are in it, and those."""
        self.zeros: dict[tuple[str, ...], ir.Value] = {}
        """Zero points for rows of one shape."""
        self.constants: dict[str, ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type == "DynamicQuantizeMatMul":
                self._replace(node)

    def _replace(self, node: ir.Node) -> None:
        source, codes, scales, zeros, *bias = node.inputs
        assert source is not None
        assert codes is not None
        assert codes.shape is not None
        if source not in self.parts:
            factor = self._take_factor(source)
            integers, scale = self._quantized(node, source, columns=int(codes.shape.numpy()[0]))
            if factor is not None:
                scale = self._node(node, "Mul", [scale, factor], f"{source.name}_rows_factor")
            self.parts[source] = integers, scale
        integers, scale = self.parts[source]
        stem = node.name or str(node.outputs[0].name)
        one, zero = self._constant("one", np.array(1, np.float32)), self._zero_point()
        if zeros is None and codes.dtype == ir.DataType.UINT8:
            zeros = zero
        inputs = [integers, codes, one, scales, zero, zeros]
        last = self._node(node, "MatMulIntegerToFloat", inputs, f"{stem}_product", "com.microsoft")
        product, last = last, self._node(node, "Mul", [last, scale], f"{stem}_scaled")
        self.scaled[last] = product, scale
        if bias and bias[0] is not None:
            last = self._node(node, "Add", [last, bias[0]], f"{stem}_biased")
        old = node.outputs[0]
        last.dtype, last.shape = old.dtype, old.shape
        is_output = old.is_graph_output()
        ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
        if is_output:
            last.name, old.name = old.name, f"{old.name}_unused"
        self.graph.remove(node, safe=True)

    def _quantized(self, at: ir.Node, source: ir.Value, columns: int) -> tuple[ir.Value, ir.Value]:
        """A value as unsigned integers, and the scale of each of its rows."""
        stem = f"{source.name}_rows"
        largest = self._node(at, "Abs", [source], f"{stem}_abs")
        axis = self._constant("axis", np.array([-1], np.int64))
        largest = self._node(at, "ReduceMax", [largest, axis], f"{stem}_magnitude", keepdims=1)
        level = self._constant("level", np.array(1 / _LEVELS, np.float32))
        scale = self._node(at, "Mul", [largest, level], f"{stem}_scale")
        zeros = self._zero_points(at, source) if self.blocked else None
        if zeros is not None:
            row: dict[str, Any] = {"axis": -1, "block_size": columns}
            return self._node(at, "QuantizeLinear", [source, scale, zeros], f"{stem}_u8", **row), scale
        unit = self._node(at, "Div", [source, scale], f"{stem}_unit")
        one = self._constant("one", np.array(1, np.float32))
        return self._node(at, "QuantizeLinear", [unit, one, self._zero_point()], f"{stem}_u8"), scale

    def _zero_points(self, at: ir.Node, source: ir.Value) -> ir.Value | None:
        """uint8 [..., 1], one for each row; computed once for all sources with rows of one shape."""
        if source.shape is None or any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in source.shape):
            return None
        rows = tuple(str(dim) for dim in source.shape[:-1])
        if rows not in self.zeros:
            stem = f"{source.name}_zero_points"
            shape = self._node(at, "Shape", [source], f"{stem}_rows", end=-1)
            one = self._constant("one_column", np.array([1], np.int64))
            shape = self._node(at, "Concat", [shape, one], f"{stem}_shape", axis=0)
            value = ir.tensor(np.array([MIDDLE], np.uint8))
            self.zeros[rows] = self._node(at, "ConstantOfShape", [shape], stem, value=value)
        return self.zeros[rows]

    def _take_factor(self, source: ir.Value) -> ir.Value | None:
        """Let the gated half of a feed-forward layer stay without its rows' scales, which are returned.

        A factor of a row changes its scale and no integer, so it can wait until behind the next product.
        """
        gate = source.producer()
        if gate is None or gate.op_type != "Mul" or source.is_graph_output():
            return None
        if any(use.node.op_type != "DynamicQuantizeMatMul" for use in source.uses()):
            return None
        for index, value in enumerate(gate.inputs):
            if value in self.scaled and len(value.uses()) == 1:
                product, scale = self.scaled[value]
                gate.replace_input_with(index, product)
                node = value.producer()
                if node is not None and node.graph is not None and not value.is_graph_output():
                    node.graph.remove(node, safe=True)
                return scale
        return None

    def _node(
        self, before: ir.Node, op: str, inputs: list[Any], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _zero_point(self) -> ir.Value:
        return self._constant("zero_point", np.array(MIDDLE, np.uint8))

    def _constant(self, name: str, value: Any) -> ir.Value:
        found = self.constants.get(name)
        if found is None:
            tensor = ir.tensor(value, name=f"row_quantize/{name}")
            found = self.constants[name] = ir.Value(
                name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(found)
        return found
