from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import edgeprompt
from edgeprompt import EngineOptions
from edgeprompt.ort.graph_cache import GraphCache
from edgeprompt.ort.session import _open_cached
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import GraphFile

TEXT = "Once upon a time"


def answers(package: Path, cache: Path | None) -> tuple[tuple[int, ...], list[float]]:
    options = EngineOptions(provider="cpu", threads=1, spinning=False, cache_folder=cache)
    with edgeprompt.load(package, options=options) as runtime:
        return runtime.generate(TEXT, max_new_tokens=8).token_ids, runtime.logits(TEXT).tolist()


def entry(cache: Path) -> Path:
    (found,) = cache.glob("graph-*")
    return found


def test_packed_weights_answer_the_same(smollm2_package: Path, tmp_path: Path) -> None:
    plain = answers(smollm2_package, None)
    assert answers(smollm2_package, tmp_path) == plain  # this start writes
    written = {path.name: path.stat().st_mtime_ns for path in entry(tmp_path).iterdir()}
    assert answers(smollm2_package, tmp_path) == plain  # this one reads
    assert {path.name: path.stat().st_mtime_ns for path in entry(tmp_path).iterdir()} == written


def test_every_architecture(encoder_package, seq2seq_package, tmp_path: Path) -> None:
    for package in (encoder_package("BERT"), seq2seq_package("T5")):
        cache, found = tmp_path / package.name, []
        for folder in (None, cache, cache):
            options = EngineOptions(provider="cpu", threads=1, cache_folder=folder)
            with edgeprompt.load(package, options=options) as runtime:
                found.append(runtime.embed([TEXT]).tolist())
        assert found[0] == found[1] == found[2]
        assert len(list(cache.glob("graph-*"))) == len(open_package(package).manifest.graphs)


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone"])
def test_a_damaged_entry_is_made_again(
    damage: str, tiny_llama_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = answers(tiny_llama_package, tmp_path)
    graph = entry(tmp_path) / "graph.onnx"
    if damage == "cut":
        graph.write_bytes(graph.read_bytes()[:100])
    elif damage == "garbage":
        graph.write_bytes(b"\x00" * graph.stat().st_size)
    else:
        (entry(tmp_path) / "graph.onnx.data").unlink()
    with caplog.at_level(logging.WARNING, "edgeprompt"):
        assert answers(tiny_llama_package, tmp_path) == plain
        assert answers(tiny_llama_package, tmp_path) == plain
    assert ("made again" in caplog.text) == (damage == "garbage")
    sizes = json.loads((entry(tmp_path) / "sizes.json").read_text())
    assert sizes["graph.onnx"] == graph.stat().st_size


def test_another_graph_or_version_finds_nothing(tiny_llama_package: Path, tmp_path: Path) -> None:
    answers(tiny_llama_package, tmp_path)
    graph = open_package(tiny_llama_package).manifest.graphs["model"]
    cache = GraphCache(tmp_path, graph)
    found = cache.find(onnxruntime.__version__)
    assert found is not None
    assert cache.find("0.0.0") is None
    assert cache.newest_weights() == found.with_name("graph.onnx.data")


def test_weights_that_go_while_one_looks_are_none(
    tiny_llama_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answers(tiny_llama_package, tmp_path)
    found = entry(tmp_path) / "graph.onnx.data"
    cache = GraphCache(tmp_path, open_package(tiny_llama_package).manifest.graphs["model"])
    assert cache.newest_weights() == found
    monkeypatch.setattr(Path, "glob", lambda *_: iter([found.with_name("gone")]))
    assert cache.newest_weights() is None
    assert answers(tiny_llama_package, tmp_path) == plain


def test_a_folder_that_cannot_be_written_is_not_needed(tiny_llama_package: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert answers(tiny_llama_package, file / "cache") == answers(tiny_llama_package, None)


@pytest.mark.parametrize(
    ("bits", "block", "size"), [(8, 32, 128), (8, 32, 512), (4, 32, 256), (4, 128, 640), (2, 128, 512)]
)
def test_blocks_of_any_size_answer_the_same_from_the_cache(bits: int, block: int, size: int, tmp_path: Path) -> None:
    """All but the second are packed to sizes that leave what is behind them unaligned, where it is read wrongly."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for layer in range(3):
        weights = rng.integers(0, 256, (size, size // block, block * bits // 8), np.uint8)
        scales = rng.random((size, size // block), np.float32) / 500
        names = [f"x{layer}", f"w{layer}", f"s{layer}"]
        tensors += [onnx.numpy_helper.from_array(*one) for one in ((weights, names[1]), (scales, names[2]))]
        attributes = {"K": size, "N": size, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(
            onnx.helper.make_node("MatMulNBits", names, [f"x{layer + 1}"], domain="com.microsoft", **attributes)
        )
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[2, size])
    graph = onnx.helper.make_graph(nodes, "g", [value("x0")], [value("x3")], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    feeds = {"x0": rng.standard_normal((2, size), np.float32)}
    cache = GraphCache(tmp_path / "cache", GraphFile(path.name, "0" * 64, {}))
    plain, *cached = (
        session.run(None, feeds)[0]
        for session in (onnxruntime.InferenceSession(path), *(_open_cached(cache, path, 1, False) for _ in range(2)))
    )
    for found in cached:
        np.testing.assert_array_equal(found, plain)
