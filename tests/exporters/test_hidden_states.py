"""Where `hidden_states` stands in a graph, and rows that int8 cannot scale."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.graft.virtual_tokens import expose_hidden_states

WIDTH, VOCAB = 4, 8


@pytest.mark.parametrize("last", ["behind the norm", "before the norm", "nowhere"])
def test_the_shape_says_at_which_positions_states_are(last: str) -> None:
    take = [helper.make_node("Slice", ["{0}", "from", "to", "axis"], ["{1}"])]
    norm = helper.make_node("LayerNormalization", ["{0}", "scale"], ["{1}"])
    steps = {"behind the norm": [norm, *take], "before the norm": [*take, norm], "nowhere": [norm]}[last]
    nodes, at = [helper.make_node("Gather", ["table", "input_ids"], ["v0"])], 0
    for step in steps:
        inputs = [f"v{at}", *step.input[1:]]
        nodes.append(helper.make_node(step.op_type, inputs, [f"v{at + 1}"]))
        at += 1
    nodes.append(helper.make_node("MatMul", [f"v{at}", "head"], ["logits"]))
    random = np.random.default_rng(0)
    tensors = {
        "table": random.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "scale": np.ones(WIDTH, np.float32),
        "head": random.normal(size=(WIDTH, VOCAB)).astype(np.float32),
        "from": np.array([-1]),
        "to": np.array([1 << 40]),
        "axis": np.array([1]),
    }
    positions = "sequence_length" if last == "nowhere" else 1
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", positions, VOCAB])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = ir.serde.deserialize_model(made)
    expose_hidden_states(model, WIDTH)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    (states,) = session.run(["hidden_states"], {"input_ids": np.array([[1, 2, 3]])})
    declared = session.get_outputs()[1].shape[1]
    assert states.shape == (1, 1 if last == "before the norm" else 3, WIDTH)
    assert declared == (1 if last == "before the norm" else "sequence_length")
