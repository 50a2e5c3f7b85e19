"""Blockwise weights: there and back, what a grid keeps, and what the graph computes with them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgeprompt.base.blockwise import (
    quantize_affine,
    quantize_blocks,
    quantize_stored,
    quantize_symmetric,
    unpack_blocks,
)
from edgeprompt.base.dequantize import dequantize_record
from exporters.quantize.graph import quantize_graph


def weights(rows=24, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def affine_grid(rows=24, columns=96, seed=0):
    """Weights as a Q4_1 file has them: 4-bit codes, float16 scale and minimum for 32 columns."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns // 32, 32), generator=random)
    codes[..., 0], codes[..., 1] = 0, 15
    scale = (torch.rand(rows, columns // 32, 1, generator=random) * 0.02 + 0.01).half().float()
    low = (-scale * (torch.rand(scale.shape, generator=random) * 8 + 4)).half().float()
    return (codes * scale + low).flatten(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_returns(bits):
    blocks = quantize_blocks(weights(), bits=bits)
    scales = blocks.scales.numpy()
    again = unpack_blocks(blocks.packed_codes(), scales, blocks.packed_zero_points(), columns=96, bits=bits, block=32)
    assert torch.equal(again.dequantize(), blocks.dequantize())


def test_error_is_about_half_a_step():
    for blocks, columns in ((quantize_symmetric(weights(columns=100)), 100), (quantize_blocks(weights(), bits=8), 96)):
        error = (blocks.dequantize() - weights(columns=columns)).abs().reshape(24, -1)
        assert error.max() <= blocks.scales.max() * 0.6


def test_offsets_keep_an_affine_grid():
    weight = affine_grid()
    blocks, offsets = quantize_affine(weight)
    kept = blocks.dequantize() + offsets.repeat_interleave(32, dim=1)
    assert (kept - weight).abs().max() < 1e-4 * weight.abs().max()
    plain = quantize_blocks(weight, bits=4).dequantize()
    assert (plain - weight).abs().max() > 1e-2 * weight.abs().max(), "the grid is one that integer zero points lose"


def test_offsets_need_whole_blocks():
    with pytest.raises(ValueError, match="whole blocks"):
        quantize_affine(weights(columns=100))


@pytest.mark.parametrize(("asked", "columns", "given"), [(32, 96, 32), (64, 192, 64), (128, 192, 64), (128, 256, 128)])
def test_the_graph_computes_with_what_is_recorded(asked, columns, given):
    """A matrix product at int4: ONNX Runtime's result is that of the dequantised record, to its int8 activations."""
    weight = affine_grid(rows=64, columns=columns)

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(columns, 64, bias=False)
            self.layer.weight.data = weight

    graph_input = ir.Value(name="x", shape=ir.Shape(["rows", columns]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = ir.tensor(weight.T.contiguous().numpy(), name="w")
    value = ir.Value(name="w", shape=ir.Shape([columns, 64]), type=ir.TensorType(stored.dtype), const_value=stored)
    node = ir.node("MatMul", [graph_input, value], name="product")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["rows", 64])
    graph = ir.Graph([graph_input], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)

    (record,) = quantize_graph(model, "int4", Base(), block_size=asked)
    assert record["pieces"] == [("layer.weight", 64, False)]
    assert (record["block"], record["offsets"] > 0) == (given, asked == 32)
    dequantised = dequantize_record(record, model.graph.initializers)
    assert (dequantised - weight).abs().max() < (0.02 if asked == 32 else 0.2) * weight.abs().max()

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    (got,) = session.run(None, {"x": x})
    want = x @ dequantised.numpy().T
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def steps_grid(levels, *, smallest=0, rows=24, columns=96):
    """Weights as files without offsets have them: integers times a float16 step for 32 columns."""
    random = torch.Generator().manual_seed(levels)
    codes = torch.randint(-levels, levels + 1 - smallest, (rows, columns // 32, 32), generator=random)
    codes[..., 0] = -levels
    step = (torch.rand(rows, columns // 32, 1, generator=random) * 0.02 + 0.01).half().float()
    return (codes * step).flatten(1)


@pytest.mark.parametrize("levels", [16, 127])
def test_eight_bits_keep_the_grid_of_a_file(levels):
    """Q5_0 and Q8_0 come back as they were."""
    weight = steps_grid(levels)
    blocks = quantize_stored(weight)
    assert (blocks.dequantize() - weight).abs().max() < 1e-6 * weight.abs().max()
    assert torch.equal(blocks.scales.half().float(), blocks.scales), "the file's float16 steps are stored as such"


def test_eight_bits_round_what_lies_on_no_grid():
    error = (quantize_stored(weights()).dequantize() - weights()).abs()
    assert error.max() <= weights().abs().max() / 127 * 0.6


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_four_bits_keep_grids_that_do_not_use_all_values(kind):
    """Q4_0 blocks need not reach 7 steps above zero, and steps of Q4_K are the products of two numbers."""
    weight = steps_grid(8, smallest=3) if kind == "Q4_0" else affine_grid()
    if kind == "Q4_K":
        random = torch.Generator().manual_seed(1)
        codes = torch.randint(2, 12, (24, 3, 32), generator=random)
        weight = (codes * (torch.rand(24, 3, 1, generator=random) * 0.013 + 0.01) - 0.07).flatten(1)
    blocks, left = quantize_affine(weight, exact_grid=True)
    kept = blocks.dequantize() + left.repeat_interleave(32, dim=1)
    assert (kept - weight).abs().max() < 1e-4 * weight.abs().max()
    blocks, left = quantize_affine(weight)
    plain = blocks.dequantize() + left.repeat_interleave(32, dim=1)
    assert (plain - weight).abs().max() > 1e-2 * weight.abs().max(), "the grid is one that 15 steps a block lose"
