"""Quantises the constant weights of a graph, whichever route it came from, and notes where each weight went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeprompt import names
from edgeprompt.base.blockwise import (
    BlockWeights,
    quantize_affine,
    quantize_blocks,
    quantize_stored,
    quantize_symmetric,
)
from edgeprompt.errors import ExportError
from exporters.graft.fuse import drop_unused
from exporters.graft.linears import Linear, WeightIndex, find_linears, initializer_tensor, is_constant
from exporters.quantize.cost import LEAST_TOKENS, Cost
from exporters.quantize.equalize import Factors, divided, equalize
from exporters.quantize.feedback import moments, quantize_affine_fed
from exporters.quantize.observe import Observed, of_pieces
from exporters.quantize.rows import MIDDLE, quantize_rows
from exporters.quantize.store import Store

BLOCK = 32
"""The smallest block, and the one whose float offsets are kept."""
TABLE_BLOCK = 64
"""Blocks of embedding tables and lm_heads, which have 8 bits; larger ones take fewer bytes for scales."""
SIGNED_8, SIGNED_7 = 127, 63
"""Largest magnitudes of signed weights. AVX2 adds two products with 8-bit activations in 16 bits, where those of 7-bit
weights always fit; 8-bit ones need ONNX Runtime's `session.x64quantprecision` there, which the runtime sets."""
EIGHT_BITS = 0.13
"""Share of the weights of an int4 graph's layers that have 8 bits, where it is known which matter most. A package has
then about the bytes of llama.cpp's Q4_K_M."""
WORTH_BITS = 1e-4
"""KL divergence, in nats, that a matrix must lose with 4 bits to be one of them."""
MIN_WEIGHTS = 4096
"""Smaller matrices stay in float: their bytes do not matter, their precision may."""


def table_block(columns: int) -> int:
    """Block size of a table: rows are looked up whole, so they must be whole blocks."""
    return TABLE_BLOCK if columns % TABLE_BLOCK == 0 else BLOCK


@dataclass(frozen=True)
class WeightRecord:
    """Where quantised parameters lie in a graph (stored in the manifest, read by `edgeprompt.base.dequantize`)."""

    codes: str
    """Initialiser with the integers."""
    scales: str
    zero_points: str | None
    layout: str
    """"blocks": MatMulNBits, codes [rows, blocks, bytes]; "columns": DynamicQuantizeMatMul, codes [columns, rows].

    Without zero points, unsigned codes lie around the middle of their range, signed ones around 0.
    """
    bits: int
    columns: int
    block: int
    offsets: int
    """How many of the last columns hold the blocks' offsets (see `_Quantizer._affine`); 0: none."""
    pieces: list[tuple[str, int, bool]]
    """(parameter, rows, stored transposed) from top to bottom, see `exporters.graft.linears.WeightIndex`."""
    factors: str | None = None
    """Powers of two that the columns of the parameters were multiplied by (`exporters.quantize.equalize`)."""


FOUR_BITS = frozenset({"Q4_0", "Q4_1", "Q4_K"})
"""GGUF types that 4 bits with a float offset for 32 weights hold. All others get 8 bits where the file decides."""


def quantize_graph(
    model: ir.Model,
    precision: str,
    torch_model: Any,
    *,
    levels: int = SIGNED_8,
    block_size: int = BLOCK,
    stored: Mapping[str, str] | None = None,
    scratch: Path | None = None,
    target: str = names.NATIVE,
    observed: Observed | None = None,
    unsigned: bool = False,
) -> list[dict[str, Any]]:
    """Quantise in place: "int4", "int8", or "fp16" (weights stored as float16); "fp32" only shares tied weights.

    int4 is MatMulNBits, accuracy_level 4 (activations to int8 inside the kernel): blocks of 32 with float offsets, or
    larger ones with integer zero points, which are quicker and less exact; the embedding and lm_head have 8 bits: 4
    there cost half as much as in all layers together. int8 has a
    scale for every column of a weight and every row of its activations (`exporters.quantize.rows`); its lm_head stays
    blockwise. An embedding table goes through GatherBlockQuantized and shares the lm_head's weights where they are
    tied.

    Args:
        model: The graph, in float32.
        precision: As above.
        torch_model: Whose parameters the graph's constants are.
        levels: largest magnitude of int8 weights, `SIGNED_8` or `SIGNED_7`.
        stored: for "gguf", parameter -> its type in the file: `FOUR_BITS` stay 4 bits, others become 8, and both keep
            the file's own grid.
        block_size: of int4 weights, 32, 64 or 128; a matrix whose columns it does not divide gets half of it.
        scratch: A folder that outlives the graph: what is quantised lies there, not in memory.
        target: "web" keeps the operators out that ONNX Runtime's WebAssembly build is slow at (MatMulNBits): the
            lm_head is int8 as all other weights, and a tied embedding reads its integers. Its weights are unsigned.
        observed: What the matrices are fed; outliers are taken out of the activations of int8 with it. Where it was
            observed closely, errors of int4 are made up for, and the matrices that lose most have 8 bits.
        unsigned: int8 weights lie around 128, as they always do for the web. Then no x86 processor overflows, whoever
            runs the graph; WebAssembly is as quick with them, and processors with VNNI are slower.

    Returns:
        A `WeightRecord` as a dictionary for each quantised weight whose parameters are known.
    """
    store = Store(scratch) if scratch is not None else None
    quantizer = _Quantizer(
        model, precision, torch_model, levels, block_size, stored or {}, store, observed, target, unsigned
    )
    records = quantizer.run()
    quantize_rows(model)
    return records


class _Quantizer:
    def __init__(
        self,
        model: ir.Model,
        precision: str,
        torch_model: Any,
        levels: int,
        block_size: int,
        stored: Mapping[str, str],
        store: Store | None,
        observed: Observed | None,
        target: str = names.NATIVE,
        unsigned: bool = False,
    ) -> None:
        self.web = target == names.WEB
        self.unsigned = unsigned or self.web
        self.graph, self.stored, self.store, self.observed = model.graph, stored, store, observed
        self.factors = Factors()
        self.eight: set[ir.Node] = set()
        """Layers of an int4 graph that have 8 bits."""
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self.precision, self.levels, self.block_size = precision, levels, block_size
        self.index = WeightIndex(torch_model)
        self.records: list[dict[str, Any]] = []
        self._made: dict[str, tuple[ir.Value, ir.Value, ir.Value | None]] = {}
        """Weight -> its codes, scales and zero points: layers may share a weight (ALBERT, DeBERTa's positions)."""
        self._sums: dict[ir.Value, ir.Value] = {}
        self._ones: dict[int, ir.Value] = {}
        self._positions = {node: at for at, node in enumerate(model.graph)}
        model.opset_imports.setdefault("com.microsoft", 1)

    def run(self) -> list[dict[str, Any]]:
        embedding = self._embedding()
        table = embedding.inputs[0] if embedding is not None else None
        head = self._head()
        tied = table is not None and head is not None and self._tied(table, head)
        if self.precision in ("fp32", "fp16"):
            if tied and table is not None and head is not None:
                self._share_float(table, head)
            if self.precision == "fp16":
                self._store_half()
            return self.records
        linears = [linear for linear in find_linears(self.graph) if math.prod(linear.shape) >= MIN_WEIGHTS]
        layers = [one for one in linears if head is None or one.node is not head.node]
        if self.precision == "int8" and self.observed is not None:
            self.factors = self._equalized(layers)
        if self.precision == "int4" and self.observed is not None and self.block_size == BLOCK:
            self.eight = self._sensitive(layers, self.observed)
        for linear in linears:
            is_head = head is not None and linear.node is head.node
            if is_head and self.web:
                codes, scales = self._dynamic(linear, linear.weight())
                if tied and embedding is not None:
                    self._gather_columns(embedding, codes, scales)
                continue
            blocks = self._linear(linear, is_head)
            if blocks is not None and is_head and tied and embedding is not None and linear.shape[1] % BLOCK == 0:
                self._gather(embedding, *blocks)
        if embedding is not None and not (tied and head is not None and head in linears):
            self._quantize_table(embedding)
        drop_unused(self.graph)
        return self.records

    def _equalized(self, linears: list[Linear]) -> Factors:
        largest = {}
        for linear in linears:
            assert self.observed is not None
            found = of_pieces(self.observed.largest, self.index.pieces(linear.weight()))
            if found is not None:
                largest[linear.node] = found
        return equalize(
            self.graph,
            linears,
            largest,
            self._initializer,
            levels=self.levels,
            measure=self._cost,
            block=table_block,
            blocks=not self.web,
        )

    def _cost(self, readers: Sequence[Linear]) -> Cost | None:
        """What 8-bit integers cost layers that share an input; None where that was not observed."""
        assert self.observed is not None
        weights = [reader.weight() for reader in readers]
        pieces = [self.index.pieces(weight) for weight in weights]
        inputs = [self.observed.inputs_of(one) for one in pieces]
        if inputs[0] is None or any(one is None for one in inputs) or len(inputs[0]) < LEAST_TOKENS:
            return None
        gradients = [self.observed.gradients_of(one) for one in pieces]
        return Cost(inputs[0], gradients, weights, predicted=self.observed.predicted, levels=self.levels)

    def _sensitive(self, linears: list[Linear], observed: Observed) -> set[ir.Node]:
        """The layers that lose most with 4 bits for each of their weights, as far as `EIGHT_BITS` goes."""
        losses: dict[ir.Node, float] = {}
        for linear in linears:
            weight = linear.weight()
            pieces = self.index.pieces(weight)
            inputs = observed.inputs_of(pieces)
            if inputs is None or weight.shape[1] % BLOCK:
                continue
            blocks, offsets = quantize_affine(weight, block=BLOCK)
            lost = blocks.dequantize() + offsets.repeat_interleave(BLOCK, dim=1) - weight
            losses[linear.node] = observed.divergence((observed.gradients_of(pieces) * (inputs @ lost.T)).sum(1))
        sizes = {linear.node: math.prod(linear.shape) for linear in linears}
        left, found = EIGHT_BITS * sum(sizes.values()), set()
        for node in sorted(losses, key=lambda one: -losses[one] / sizes[one]):
            if losses[node] >= WORTH_BITS and sizes[node] <= left:
                found.add(node)
                left -= sizes[node]
        return found

    def _linear(self, linear: Linear, is_head: bool) -> tuple[BlockWeights, ir.Value, ir.Value, ir.Value | None] | None:
        """Quantise one weight, which is read here and let go; what `_gather` needs where it has 8 bits."""
        weight = linear.weight()
        if self.precision == "int8" and not is_head and linear.node not in self.factors.blocks:
            self._dynamic(linear, weight)
        elif self._four_bits(weight) and not (is_head or linear.node in self.eight or weight.shape[1] % BLOCK):
            if self.block_size == BLOCK:
                self._affine(linear, weight)
            else:
                self._integer(linear, weight)
        else:
            return self._nbits(linear, weight)
        return None

    def _tied(self, table: ir.Value, head: Linear) -> bool:
        """Whether the output layer's weight is the embedding table."""
        if tuple(table.shape.numpy() if table.shape is not None else ()) != head.shape:
            return False
        if table is head.value:
            return True
        # Both by the parameter that they are, one after the other: two copies need not be in memory together.
        first, second = self.index.pieces(initializer_tensor(table)), self.index.pieces(head.weight())
        if first and second:
            return first == second
        return torch.equal(initializer_tensor(table), head.weight())

    def _four_bits(self, weight: torch.Tensor) -> bool:
        if self.precision != "gguf":
            return self.precision == "int4"
        pieces = self.index.pieces(weight)
        return bool(pieces) and all(self.stored.get(name) in FOUR_BITS for name, _, _ in pieces)

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
            users = list(value.uses())
            wide = self._cast(half)
            for user, at in users:
                user.replace_input_with(at, wide)
        drop_unused(self.graph)

    def _affine(self, linear: Linear, weight: torch.Tensor) -> None:
        """4 bits with a float offset for every block, in one MatMulNBits.

        `sum_k x[k] * (code * scale + offset[block of k])` needs the sum of x over each block beside x itself. Those
        sums are appended to x (one small product with a constant matrix of ones, shared by all readers of x), and
        the offsets, quantised like weights, to the weight's columns.
        """
        columns = weight.shape[1]
        factor = self._factor_of(weight)
        if factor is not None:
            blocks, stored = quantize_affine_fed(weight, factor)
        else:
            blocks, offsets = quantize_affine(weight, block=BLOCK, exact_grid=self.precision == "gguf")
            padded = torch.nn.functional.pad(offsets, (0, -offsets.shape[1] % BLOCK))
            stored = quantize_blocks(padded, bits=4, block=BLOCK)
        value = linear.node.inputs[0]
        assert value is not None
        fed = self._with_block_sums(value, columns)
        self._matmul(linear, weight, blocks.joined(stored), fed, BLOCK, offsets=stored.columns)

    def _factor_of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """`moments` of a weight's inputs, computed once for layers in a row that are fed the same; None: not known."""
        inputs = self.observed.inputs_of(self.index.pieces(weight)) if self.observed is not None else None
        if inputs is None or self.precision != "int4":
            return None
        if self._moments is None or not torch.equal(self._moments[0], inputs):
            self._moments = inputs, moments(inputs)
        return self._moments[1]

    def _integer(self, linear: Linear, weight: torch.Tensor) -> None:
        """4 bits with integer zero points, in the largest blocks that the columns are whole blocks of."""
        value, block = linear.node.inputs[0], self.block_size
        assert value is not None
        while weight.shape[1] % block:
            block //= 2
        self._matmul(linear, weight, quantize_blocks(weight, bits=4, block=block), value, block)

    def _with_block_sums(self, value: ir.Value, columns: int) -> ir.Value:
        """`value [..., columns]` with the sums over its blocks behind it, padded to whole blocks."""
        if value in self._sums:
            return self._sums[value]
        blocks = columns // BLOCK
        ones = self._ones.get(columns)
        if ones is None:
            matrix = np.zeros((columns, blocks - blocks % -BLOCK), np.uint8)
            matrix[np.arange(columns), np.arange(columns) // BLOCK] = 1
            ones = self._ones[columns] = self._cast(self._initializer(f"block_ones_{columns}", matrix))
        sums = ir.node("MatMul", [value, ones], name=f"{value.name}_block_sums")
        both = ir.node("Concat", [value, sums.outputs[0]], {"axis": -1}, name=f"{value.name}_with_block_sums")
        for node in (sums, both):
            node.outputs[0].name, node.outputs[0].dtype = node.name, value.dtype
        reader = min(
            (user for user, _ in value.uses() if user is not sums and user is not both),
            key=lambda node: self._positions.get(node, 0),
        )
        self.graph.insert_before(reader, [sums, both])
        self._sums[value] = both.outputs[0]
        return both.outputs[0]

    def _eight_bits(self, weight: torch.Tensor) -> BlockWeights:
        if self.precision == "gguf":
            return quantize_stored(weight, block=BLOCK)
        return quantize_symmetric(weight, block=table_block(weight.shape[1]))

    def _nbits(self, linear: Linear, weight: torch.Tensor) -> tuple[BlockWeights, ir.Value, ir.Value, ir.Value | None]:
        value = linear.node.inputs[0]
        assert value is not None
        factors = self.factors.columns.get(linear.node)
        blocks = self._eight_bits(weight if factors is None else weight * initializer_tensor(factors))
        return blocks, *self._matmul(linear, weight, blocks, value, blocks.codes.shape[2], factors=factors)

    def _matmul(
        self,
        linear: Linear,
        weight: torch.Tensor,
        blocks: BlockWeights,
        value: ir.Value,
        block: int,
        offsets: int = 0,
        factors: ir.Value | None = None,
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        bits, stem = blocks.bits, str(linear.value.name)
        known = stem in self._made and factors is None
        codes, scales, zeros = self._made[stem] if known else self._stored(stem, blocks)
        if factors is None:
            self._made[stem] = codes, scales, zeros
        inputs = [value, codes, scales, zeros]
        if linear.bias is not None:
            inputs += [None, linear.bias]
        if not known:
            named = None if factors is None else str(factors.name)
            self._record(
                weight,
                codes,
                scales,
                zeros,
                "blocks",
                bits,
                columns=blocks.columns,
                block=block,
                offsets=offsets,
                factors=named,
            )
        attributes = {"K": blocks.columns, "N": weight.shape[0], "bits": bits, "block_size": block}
        self._replace(linear.node, "MatMulNBits", inputs, {**attributes, "accuracy_level": 4})
        return codes, scales, zeros

    def _stored(self, stem: str, blocks: BlockWeights) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Initialisers of codes, scales and zero points; scales that float16 can hold are stored so."""
        codes = self._initializer(f"{stem}_q{blocks.bits}", blocks.packed_codes())
        zeros = None
        if blocks.bits < 8:
            zeros = self._initializer(f"{stem}_zero_points", blocks.packed_zero_points())
        if torch.equal(blocks.scales.half().float(), blocks.scales):
            half = self._initializer(f"{stem}_scales", blocks.scales.half().numpy())
            return codes, self._cast(half), zeros
        return codes, self._initializer(f"{stem}_scales", blocks.scales.numpy()), zeros

    def _cast(self, stored: ir.Value) -> ir.Value:
        """The float32 of an initialiser; ONNX Runtime computes it once, when it loads the graph."""
        node = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=f"{stored.name}_cast")
        out = node.outputs[0]
        out.name, out.dtype, out.shape = node.name, ir.DataType.FLOAT, stored.shape
        self.graph.insert_before(next(iter(self.graph)), node)
        return out

    def _dynamic(self, linear: Linear, weight: torch.Tensor) -> tuple[ir.Value, ir.Value]:
        columns, rows = self.factors.columns.get(linear.node), self.factors.rows.get(linear.node)
        codes, scales = self._columns(str(linear.value.name), weight, columns)
        used, bias = scales, linear.bias
        if rows is not None:
            used = divided(self.graph, linear.node, scales, rows)
            bias = divided(self.graph, linear.node, bias, rows) if bias is not None else None
        inputs = [linear.node.inputs[0], codes, used, None]
        if bias is not None:
            inputs.append(bias)
        self._replace(linear.node, "DynamicQuantizeMatMul", inputs, {})
        return codes, scales

    def _columns(self, stem: str, weight: torch.Tensor, factors: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Integers [columns, rows] and a scale for each row of a weight [rows, columns], perhaps times factors."""
        if stem in self._made and factors is None:
            return self._made[stem][:2]
        scaled = weight if factors is None else weight * initializer_tensor(factors)
        scale = scaled.abs().amax(1, keepdim=True).clamp(min=1e-12) / self.levels
        integers = torch.round(scaled / scale)
        integers = integers.add_(MIDDLE).to(torch.uint8) if self.unsigned else integers.to(torch.int8)
        codes = self._initializer(f"{stem}_{'u8' if self.unsigned else 's8'}", integers.T.contiguous().numpy())
        scales = self._initializer(f"{stem}_scales", scale.squeeze(1).numpy())
        named = None if factors is None else str(factors.name)
        self._record(weight, codes, scales, None, "columns", 8, columns=weight.shape[1], factors=named)
        self._made[stem] = codes, scales, None
        return codes, scales

    def _gather_columns(self, embedding: ir.Node, codes: ir.Value, scales: ir.Value) -> None:
        """Look rows up as columns of integers [hidden_size, vocab_size], which an output layer may share; scale them.

        GatherBlockQuantized would do it in one node, and not every WebAssembly build has it.
        """
        ids, old = embedding.inputs[1], embedding.outputs[0]
        assert ids is not None
        last = self._initializer(f"{codes.name}_last_axis", np.array([-1], np.int64))

        def add(operator: str, inputs: list[ir.Value], what: str, dtype: ir.DataType, **attributes: Any) -> ir.Value:
            node = ir.node(operator, inputs, attributes, name=f"{codes.name}_{what}")
            node.outputs[0].name, node.outputs[0].dtype = node.name, dtype
            self.graph.insert_before(embedding, node)
            return node.outputs[0]

        middle = self._initializer(f"{codes.name}_middle", np.array(MIDDLE, np.float32))
        columns = add("Gather", [codes, ids], "columns", ir.DataType.UINT8, axis=1)
        rows = add("Transpose", [columns], "rows", ir.DataType.UINT8, perm=[1, 2, 0])
        floats = add("Cast", [rows], "floats", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        floats = add("Sub", [floats, middle], "centred", ir.DataType.FLOAT)
        factors = add("Gather", [scales, ids], "row_scales", ir.DataType.FLOAT, axis=0)
        factors = add("Unsqueeze", [factors, last], "row_factors", ir.DataType.FLOAT)
        looked_up = add("Mul", [floats, factors], "looked_up", ir.DataType.FLOAT)
        looked_up.shape = old.shape
        ir.convenience.replace_all_uses_with(old, looked_up)
        self.graph.remove(embedding, safe=True)

    def _quantize_table(self, embedding: ir.Node) -> None:
        table = embedding.inputs[0]
        assert table is not None
        weight = initializer_tensor(table)
        if self.web and weight.numel() >= MIN_WEIGHTS:
            codes, scales = self._columns(str(table.name), weight)
            self._gather_columns(embedding, codes, scales)
            return
        if weight.shape[1] % BLOCK or weight.numel() < MIN_WEIGHTS:
            return
        blocks = self._eight_bits(weight)
        codes, scales, zeros = self._stored(str(table.name), blocks)
        self._gather(embedding, blocks, codes, scales, zeros)
        self._record(weight, codes, scales, zeros, "blocks", 8, columns=blocks.columns, block=blocks.codes.shape[2])

    def _gather(
        self, embedding: ir.Node, blocks: BlockWeights, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None
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
            {"bits": blocks.bits, "block_size": blocks.codes.shape[2], "gather_axis": 0, "quantize_axis": 1},
        )

    def _replace(self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int]) -> None:
        new = ir.node(op_type, inputs, attributes, domain="com.microsoft", name=node.name)
        old = node.outputs[0]
        out = new.outputs[0]
        out.dtype, out.shape = old.dtype, old.shape
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], [old], [out])

    def _initializer(self, name: str, array: Any) -> ir.Value:
        tensor = self.store.put(name, array) if self.store is not None else ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _record(
        self,
        weight: torch.Tensor,
        codes: ir.Value,
        scales: ir.Value,
        zeros: ir.Value | None,
        layout: str,
        bits: int,
        *,
        columns: int,
        block: int = BLOCK,
        offsets: int = 0,
        factors: str | None = None,
    ) -> None:
        pieces = self.index.pieces(weight)
        if not pieces:
            raise ExportError(
                f"the weight behind {codes.name!r} is made of no parameters of the base, so nothing could prove it; "
                "export at fp32, and report the base"
            )
        cast = scales.producer()
        stored = cast.inputs[0] if cast is not None else scales
        assert stored is not None
        self.records.append(
            asdict(
                WeightRecord(
                    str(codes.name),
                    str(stored.name),
                    zeros.name if zeros else None,
                    layout,
                    bits,
                    columns,
                    block,
                    offsets,
                    pieces,
                    factors,
                )
            )
        )
