"""int8: weights whose products no processor saturates, and what tuning for the package gets to see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from exporters.dequantize import load_package_weights
from exporters.load import load_base
from exporters.quantize import SIGNED_7


def test_two_products_fit_the_sixteen_bits_that_avx2_adds_them_in(encoder_package: Callable[..., Path]) -> None:
    assert 2 * 255 * SIGNED_7 < 1 << 15
    graph = onnx.load(encoder_package("BERT", "int8") / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(weights) == 2 * 6 + 2  # the layers, the pooler, and the head's transformation
    for name in weights:
        codes = numpy_helper.to_array(tensors[name])
        assert codes.dtype == np.int8
        assert np.abs(codes).max(0).tolist() == [SIGNED_7] * codes.shape[1]


def test_tuning_for_the_package_sees_its_weights(
    encoder_base: Callable[[str], Path], encoder_package: Callable[..., Path]
) -> None:
    loaded, plain = load_base(encoder_base("BERT")), load_base(encoder_base("BERT"))
    found = load_package_weights(loaded.model, encoder_package("BERT", "int8"))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert name in found.parameters
    before, after = (dict(one.model.named_parameters())[name].detach() for one in (plain, loaded))
    step = before.abs().amax(1, keepdim=True) / SIGNED_7
    assert torch.all((before - after).abs() <= step / 2 + 1e-6)
    assert not torch.equal(before, after)
