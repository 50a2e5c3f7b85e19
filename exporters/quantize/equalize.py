"""Takes outliers out of what linear layers are fed, before it becomes 8-bit integers: SmoothQuant, in powers of two.

A column of a layer's input is divided by a factor, and the weight's column is multiplied by it, so the product stays
what it was (Xiao et al., "SmoothQuant", 2023). The division costs nothing: it goes into the scale of the norm in front,
or into the rows of the matrix whose product the input is. Both are constants, which ONNX Runtime computes when it
opens a graph. Factors are powers of two, so no value is rounded by them, and what a package stores can be compared with
its base's weights exactly.

Where a base was observed closely, the factors are those that cost least (`exporters.quantize.cost`); elsewhere they
follow from the largest values of a column.

Where a few columns are so large that no factor helps, a layer gets scales for blocks of columns, of its input and of
its weight. That is slower for many tokens, so few layers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from exporters.graft.linears import Linear
from exporters.quantize.cost import Cost

SHARE = 0.65
"""How much of the outliers goes from activations to weights: 0 none, 1 all. Chosen by the KL divergence of SmolLM2
135M and Gemma 3 270M on the training texts of examples/data: 0.5 and 0.8 are worse for one or both."""
LEAST, MOST = -4, 5
"""Bounds of the factors' exponents. A column that is small in the calibration texts may be large in others. One that
took in a far larger one would leave few steps to the others of its weights."""
STANDS_OUT, MOST_BLOCKS = 32.0, 0.06
"""A layer whose largest column is so many times its median column gets blocks, the worst first, for this share of all
weights at most. They are computed at about 0.6 of the others' speed."""
WORTH_BLOCKS, MOST_WORTH = 1e-4, 0.035
"""KL divergence, in nats, that blocks must save where costs are known, and the share of all weights that may have
them there: those that save most for each weight."""
LARGEST_ERROR = 0.03
"""Of a weight with its factors, relative to its size; factors are limited further where it would be larger."""
_SCALE_AT = {
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
    "LayerNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
}
"""Norm -> its inputs that the result is proportional to, one after the other."""

_CHUNK_VALUES = 1 << 22
"""Values of a weight that are computed with at a time."""

Constant = Callable[[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"], ir.Value]


@dataclass
class Factors:
    """What linear layers' weights are multiplied by: initialisers, float32, one value for each column or row."""

    columns: dict[ir.Node, ir.Value] = field(default_factory=dict)
    rows: dict[ir.Node, ir.Value] = field(default_factory=dict)
    """The layer's result is divided by these."""
    blocks: set[ir.Node] = field(default_factory=set)
    """Layers that want scales for blocks of columns."""


@dataclass
class _Source:
    """An input of layers, and what becomes of it."""

    readers: list[Linear]
    norm: ir.Node | None = None
    """Whose scale is divided."""
    before: Linear | None = None
    """Whose rows are divided."""
    exponents: torch.Tensor | None = None
    saved: float | None = None
    """What blocks would save, in nats; None: not known."""


def equalize(
    graph: ir.Graph,
    linears: Sequence[Linear],
    largest: Mapping[ir.Node, torch.Tensor],
    constant: Constant,
    *,
    levels: int,
    measure: Callable[[Sequence[Linear]], Cost | None] = lambda _: None,
    block: Callable[[int], int] = lambda _: 0,
    blocks: bool = True,
) -> Factors:
    """Divide the inputs of linear layers, in place, where that is free; their weights are left to the caller.

    Args:
        graph: The graph, in float32.
        linears: The layers whose inputs become integers.
        largest: Largest magnitude of each column of a layer's input; layers that are missing stay as they are.
        constant: Makes an initialiser.
        levels: Largest magnitude of the integers that weights become.
        measure: What integers cost layers that share an input; None: not known.
        block: Size of the blocks that so many columns would get.
        blocks: Whether layers may want blocks.
    """
    found = Factors()
    nodes = {linear.node: linear for linear in linears}
    sources = _sources(linears, largest, nodes)
    for one in sources.values():
        cost, columns = measure(one.readers), one.readers[0].shape[1]
        if one.norm is not None or one.before is not None:
            one.exponents = _exponents(largest[one.readers[0].node], one.readers, levels, cost)
        size = block(columns)
        if cost is not None and size and columns % size == 0:
            exponents = torch.zeros(columns) if one.exponents is None else one.exponents
            one.saved = cost.of(exponents) - cost.of(exponents, size)
    if blocks:
        found.blocks = _outliers(sources, largest, sum(math.prod(linear.shape) for linear in linears))
    for source, one in sources.items():
        in_blocks = one.readers[0].node in found.blocks
        before = one.before
        if one.exponents is None or not bool(one.exponents.any()) or (in_blocks and one.saved is None):
            continue
        if before is not None and before.node in found.blocks:
            continue
        factors = constant(f"{source.name}_factors", torch.exp2(one.exponents).numpy())
        found.columns |= {reader.node: factors for reader in one.readers}
        if before is not None:
            found.rows[before.node] = factors
            continue
        norm = one.norm
        assert norm is not None
        for index in _SCALE_AT[norm.op_type]:
            if len(norm.inputs) > index and (scale := norm.inputs[index]) is not None:
                norm.replace_input_with(index, divided(graph, norm, scale, factors))
    return found


def _sources(
    linears: Sequence[Linear], largest: Mapping[ir.Node, torch.Tensor], nodes: Mapping[ir.Node, Linear]
) -> dict[ir.Value, _Source]:
    """Inputs whose columns are known, and where factors of them could go."""
    found: dict[ir.Value, _Source] = {}
    for linear in linears:
        source = linear.node.inputs[0]
        assert source is not None
        found.setdefault(source, _Source([])).readers.append(linear)
    found = {source: one for source, one in found.items() if all(reader.node in largest for reader in one.readers)}
    for source, one in found.items():
        only = {use.node for use in source.uses()} == {reader.node for reader in one.readers}
        if not only or source.is_graph_output():
            continue
        norm = source.producer()
        one.before = _before(source, nodes)
        if one.before is None and norm is not None and source is norm.outputs[0] and norm.op_type in _SCALE_AT:
            one.norm = norm
    return found


def _outliers(
    sources: Mapping[ir.Value, _Source], largest: Mapping[ir.Node, torch.Tensor], weights: int
) -> set[ir.Node]:
    """The layers that want blocks most, as far as the share of all weights goes that may have them."""
    wanted: dict[ir.Value, float] = {}
    sizes = {source: sum(math.prod(reader.shape) for reader in one.readers) for source, one in sources.items()}
    known = {source: one.saved for source, one in sources.items() if one.saved is not None}
    for source, saved in known.items():
        if saved >= WORTH_BLOCKS:
            wanted[source] = saved / sizes[source]
    for source, one in sources.items() if not known else ():
        columns = largest[one.readers[0].node]
        standing = float(columns.max() / columns.median().clamp(min=1e-30))
        if standing >= STANDS_OUT:
            wanted[source] = standing
    found: set[ir.Node] = set()
    left = (MOST_WORTH if known else MOST_BLOCKS) * weights
    for source in sorted(wanted, key=lambda one: -wanted[one]):
        if sizes[source] <= left:
            found |= {reader.node for reader in sources[source].readers}
            left -= sizes[source]
    return found


def divided(graph: ir.Graph, at: ir.Node, value: ir.Value, factors: ir.Value) -> ir.Value:
    """A constant over factors, computed by ONNX Runtime when it opens the graph."""
    name = f"{value.name}_over_{factors.name}"
    node = ir.node("Div", [value, factors], name=name)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = name, ir.DataType.FLOAT, factors.shape
    graph.insert_before(at, node)
    return out


def _before(source: ir.Value, nodes: Mapping[ir.Node, Linear]) -> Linear | None:
    """The layer whose product, times a gate, is `source`, if nobody else reads that product."""
    gate = source.producer()
    if gate is None or gate.op_type != "Mul":
        return None
    for value in reversed(gate.inputs):
        maker = value.producer() if value is not None else None
        if value is None or maker not in nodes or len(value.uses()) != 1 or value.is_graph_output():
            continue
        if nodes[maker].shape[0] == (source.shape[-1] if source.shape is not None else None):
            return nodes[maker]
    return None


def _exponents(largest: torch.Tensor, readers: Sequence[Linear], levels: int, cost: Cost | None) -> torch.Tensor:
    """log2 of the factors: those that cost least, or how far a column's activations stand out, and how little its
    weights do."""
    matrices = [reader.weight() for reader in readers]
    weights = torch.stack([matrix.abs().amax(0) for matrix in matrices]).amax(0)
    used = (largest > 0) & (weights > 0)
    if not bool(used.any()):
        return torch.zeros_like(weights)
    if cost is not None:
        wanted = torch.where(used, cost.least(), 0.0)
    else:
        tiny = torch.finfo(torch.float32).tiny
        wanted = SHARE * torch.log2(largest.clamp(min=tiny)) - (1 - SHARE) * torch.log2(weights.clamp(min=tiny))
        wanted = torch.where(used, torch.round(wanted - wanted[used].median()), 0.0)
    for most in range(MOST, 0, -1):
        exponents = wanted.clamp(LEAST, most)
        if all(_error(matrix, torch.exp2(exponents), levels) <= LARGEST_ERROR for matrix in matrices):
            return exponents
    return torch.zeros_like(wanted)


def _error(weight: torch.Tensor, factors: torch.Tensor, levels: int) -> float:
    """How far a weight, times its factors, is from what integers with a scale for each row make of it."""
    lost = size = 0.0
    for part in torch.split(weight, max(1, _CHUNK_VALUES // weight.shape[1])):
        scaled = part * factors
        steps = scaled.abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
        lost += float((torch.round(scaled / steps) * steps - scaled).square().sum())
        size += float(scaled.square().sum())
    return math.sqrt(lost / max(size, 1e-30))
