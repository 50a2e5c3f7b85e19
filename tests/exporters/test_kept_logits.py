from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgeprompt import names
from exporters.contract import ExportOptions
from exporters.decoder_only import build
from exporters.graft.kept_logits import keep_logits
from tests.support.decoder_models import loaded_decoder

IDS = np.random.default_rng(0).integers(3, 500, (2, 9))


def run(path: Path, keep: int | None) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        names.INPUT_IDS: IDS,
        names.ATTENTION_MASK: np.ones_like(IDS),
        names.PROMPT_EMBEDDINGS: np.zeros((1, 64), np.float32),
    }
    for value in session.get_inputs():
        if value.name.startswith(names.PAST_KEY_VALUES):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        elif value.name == names.POSITION_IDS:
            feeds[value.name] = np.tile(np.arange(IDS.shape[1]), (2, 1))
    if keep is not None:
        feeds[names.LOGITS_TO_KEEP] = np.array([keep], np.int64)
    found = session.run(None, feeds)
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    build(loaded_decoder("llama"), ExportOptions(precision="fp32", route="torch"), folder, folder)
    return folder / "model.onnx"


def test_the_last_positions_as_many_as_are_asked_for(graph: Path) -> None:
    whole = run(graph, IDS.shape[1])
    assert whole[names.KEPT_LOGITS].shape == (2, 9, 500)
    for keep in (1, 3, 9, 20):
        found = run(graph, keep)
        assert found[names.KEPT_LOGITS].shape == (2, min(keep, 9), 500)
        assert np.allclose(found[names.KEPT_LOGITS], whole[names.KEPT_LOGITS][:, -keep:], atol=1e-5)
        assert found[names.LOGITS].shape == (2, 1, 500)
        assert (found[names.LOGITS] == found[names.KEPT_LOGITS][:, -1:]).all()


def test_who_does_not_know_the_input_gets_the_last_position(graph: Path) -> None:
    """As ONNX Runtime GenAI and stock ONNX Runtime call it: the input is not among the required ones."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert names.LOGITS_TO_KEEP not in [value.name for value in session.get_inputs()]
    shapes = {value.name: value.shape for value in session.get_outputs()}
    assert shapes[names.LOGITS][1:] == [1, 500]  # GenAI reads the 1
    found = run(graph, None)
    assert (found[names.LOGITS] == run(graph, 1)[names.LOGITS]).all()
    assert found[names.KEPT_LOGITS].shape == (2, 1, 500)


def test_a_graph_with_logits_at_every_position_stays_as_it_is(graph: Path) -> None:
    model = ir.load(graph)
    assert not keep_logits(model, 500)  # it has been done
    (logits,) = (value for value in model.graph.outputs if value.name == names.LOGITS)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.name != names.LOGITS_TO_KEEP]
    logits.shape = ir.Shape(["batch_size", "sequence_length", 500])
    before = [value.name for value in model.graph.outputs]
    assert not keep_logits(model, 500)
    assert [value.name for value in model.graph.outputs] == before
