"""Quantises the constant weights of a graph, whichever route it came from, and notes where each weight went."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeprompt import names
from exporters.blockwise import BlockWeights, quantize_blocks
from exporters.fuse import drop_unused
from exporters.linears import Linear, WeightIndex, find_linears, initializer_tensor, is_constant

BLOCK = 32
MIN_WEIGHTS = 4096
"""Smaller matrices stay in float: their bytes do not matter, their precision may."""


@dataclass(frozen=True)
class WeightRecord:
    """Where quantised parameters lie in a graph (stored in the manifest, read by `exporters.dequantize`)."""

    codes: str
    """Initialiser with the integers."""
    scales: str
    zero_points: str | None
    layout: str
    """"blocks": MatMulNBits, codes [rows, blocks, bytes]; "columns": DynamicQuantizeMatMul, codes [columns, rows]."""
    bits: int
    columns: int
    block: int
    pieces: list[tuple[str, int, bool]]
    """(parameter, rows, stored transposed) from top to bottom, see `exporters.linears.WeightIndex`."""


def quantize_graph(model: ir.Model, precision: str, torch_model: Any) -> list[dict[str, Any]]:
    """Quantise in place: "int4", "int8", or "fp16" (weights stored as float16); "fp32" only shares tied weights.

    int4 is MatMulNBits, blocks of 32, accuracy_level 4 (activations to int8 inside the kernel). int8 is dynamic with
    unsigned weights and activations (U8U8: U8S8 saturates on x86 without VNNI); its lm_head stays blockwise. An
    embedding table goes through GatherBlockQuantized and shares the lm_head's weights where they are tied.

    Returns:
        A `WeightRecord` as a dictionary for each quantised weight whose parameters are known.
    """
    return _Quantizer(model, precision, torch_model).run()


class _Quantizer:
    def __init__(self, model: ir.Model, precision: str, torch_model: Any) -> None:
        self.graph = model.graph
        self.precision = precision
        self.index = WeightIndex(torch_model)
        self.records: list[dict[str, Any]] = []
        model.opset_imports.setdefault("com.microsoft", 1)

    def run(self) -> list[dict[str, Any]]:
        embedding = self._embedding()
        table = embedding.inputs[0] if embedding is not None else None
        head = self._head()
        tied = table is not None and head is not None and torch.equal(initializer_tensor(table), head.weight())
        if self.precision in ("fp32", "fp16"):
            if tied and table is not None and head is not None:
                self._share_float(table, head)
            if self.precision == "fp16":
                self._store_half()
            return self.records
        linears = [linear for linear in find_linears(self.graph) if linear.weight().numel() >= MIN_WEIGHTS]
        for linear in linears:
            is_head = head is not None and linear.node is head.node
            if self.precision == "int8" and not is_head:
                self._dynamic(linear)
                continue
            bits = 4 if self.precision == "int4" else 8
            blocks = self._nbits(linear, bits)
            if is_head and tied and embedding is not None:
                self._gather(embedding, *blocks)
        if embedding is not None and not (tied and head is not None and head in linears):
            self._quantize_table(embedding)
        drop_unused(self.graph)
        return self.records

    def _embedding(self) -> ir.Node | None:
        ids = next((value for value in self.graph.inputs if value.name == names.INPUT_IDS), None)
        for node, _ in ids.uses() if ids is not None else ():
            table = node.inputs[0] if node.op_type == "Gather" else None
            if table is not None and is_constant(self.graph, table):
                return node
        return None

    def _head(self) -> Linear | None:
        """The product whose result is the logits, perhaps through a few elementwise nodes."""
        value = next((output for output in self.graph.outputs if output.name == names.LOGITS), None)
        linears = {linear.node: linear for linear in find_linears(self.graph)}
        for _ in range(8):
            node = value.producer() if value is not None else None
            if node is None or node in linears:
                return linears.get(node) if node is not None else None
            value = node.inputs[0]
        return None

    def _share_float(self, table: ir.Value, head: Linear) -> None:
        if head.node.op_type != "MatMul" or head.value is table:
            return
        name = f"{table.name}_transposed"
        node = ir.node("Transpose", [table], {"perm": [1, 0]}, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(head.node, node)
        head.node.replace_input_with(1, node.outputs[0])
        drop_unused(self.graph)

    def _store_half(self) -> None:
        for value in list(self.graph.initializers.values()):
            if value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 2:
                continue
            if int(np.prod(value.shape.numpy())) < MIN_WEIGHTS or value in self.graph.inputs:
                continue
            half = self._initializer(f"{value.name}_fp16", initializer_tensor(value).half().numpy())
            node = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}_cast")
            node.outputs[0].name = f"{value.name}_cast"
            node.outputs[0].dtype = ir.DataType.FLOAT
            node.outputs[0].shape = value.shape
            users = list(value.uses())
            self.graph.insert_before(next(iter(self.graph)), node)
            for user, at in users:
                user.replace_input_with(at, node.outputs[0])
        drop_unused(self.graph)

    def _nbits(self, linear: Linear, bits: int) -> tuple[BlockWeights, ir.Value, ir.Value, ir.Value]:
        weight = linear.weight()
        blocks = quantize_blocks(weight, bits=bits, block=BLOCK)
        stem = linear.value.name
        codes = self._initializer(f"{stem}_q{bits}", blocks.packed_codes())
        scales = self._initializer(f"{stem}_scales", blocks.scales.numpy())
        zeros = self._initializer(f"{stem}_zero_points", blocks.packed_zero_points())
        inputs = [linear.node.inputs[0], codes, scales, zeros]
        if linear.bias is not None:
            inputs += [None, linear.bias]
        rows, columns = weight.shape
        self._replace(
            linear.node,
            "MatMulNBits",
            inputs,
            {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4},
        )
        self._record(weight, codes, scales, zeros, "blocks", bits)
        return blocks, codes, scales, zeros

    def _dynamic(self, linear: Linear) -> None:
        weight = linear.weight().float()
        low = weight.amin(1, keepdim=True).clamp(max=0)
        high = weight.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=1e-12) / 255
        zero = torch.round(-low / scale).clamp(0, 255)
        integers = torch.round(weight / scale + zero).clamp(0, 255).to(torch.uint8)
        stem = linear.value.name
        codes = self._initializer(f"{stem}_u8", integers.T.contiguous().numpy())
        scales = self._initializer(f"{stem}_scales", scale.squeeze(1).numpy())
        zeros = self._initializer(f"{stem}_zero_points", zero.squeeze(1).to(torch.uint8).numpy())
        inputs = [linear.node.inputs[0], codes, scales, zeros]
        if linear.bias is not None:
            inputs.append(linear.bias)
        self._replace(linear.node, "DynamicQuantizeMatMul", inputs, {})
        self._record(weight, codes, scales, zeros, "columns", 8)

    def _quantize_table(self, embedding: ir.Node) -> None:
        table = embedding.inputs[0]
        assert table is not None
        weight = initializer_tensor(table)
        if weight.shape[1] % BLOCK or weight.numel() < MIN_WEIGHTS:
            return
        bits = 4 if self.precision == "int4" else 8
        blocks = quantize_blocks(weight, bits=bits, block=BLOCK)
        codes = self._initializer(f"{table.name}_q{bits}", blocks.packed_codes())
        scales = self._initializer(f"{table.name}_scales", blocks.scales.numpy())
        zeros = self._initializer(f"{table.name}_zero_points", blocks.packed_zero_points())
        self._gather(embedding, blocks, codes, scales, zeros)
        self._record(weight, codes, scales, zeros, "blocks", bits)

    def _gather(
        self, embedding: ir.Node, blocks: BlockWeights, codes: ir.Value, scales: ir.Value, zeros: ir.Value
    ) -> None:
        """Look rows up in blockwise weights (the same initialisers that MatMulNBits reads)."""
        rows = blocks.codes.shape[0]
        shape = self._initializer(f"{codes.name}_rows", np.array([rows, -1], np.int64))
        flat = ir.node("Reshape", [codes, shape], name=f"{codes.name}_flat")
        flat.outputs[0].name = f"{codes.name}_flat"
        self.graph.insert_before(embedding, flat)
        self._replace(
            embedding,
            "GatherBlockQuantized",
            [flat.outputs[0], embedding.inputs[1], scales, zeros],
            {"bits": blocks.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1},
        )

    def _replace(self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int]) -> None:
        new = ir.node(op_type, inputs, attributes, domain="com.microsoft", name=node.name)
        old = node.outputs[0]
        out = new.outputs[0]
        out.dtype, out.shape = old.dtype, old.shape
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], [old], [out])

    def _initializer(self, name: str, array: Any) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _record(
        self, weight: torch.Tensor, codes: ir.Value, scales: ir.Value, zeros: ir.Value, layout: str, bits: int
    ) -> None:
        pieces = self.index.pieces(weight)
        if pieces:
            record = WeightRecord(
                str(codes.name), str(scales.name), zeros.name, layout, bits, weight.shape[1], BLOCK, pieces
            )
            self.records.append(asdict(record))
