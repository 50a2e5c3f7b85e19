"""Packages for the web, and transformers.js' layout: other operators and file names, the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgeprompt
from edgeprompt.base.dequantize import load_package_weights
from edgeprompt.base.load import load_base
from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.package.folder import open_package
from exporters import export_model, layout, validate_package
from tests.support.decoder_models import CONFIGS, loaded_decoder
from tests.support.runtimes import QUIET

SLOW = {"MatMulNBits", "GatherBlockQuantized"}
"""Operators that ONNX Runtime's WebAssembly build is slow at, or that one of its builds lacks."""


def _nodes(package: Path) -> list[onnx.NodeProto]:
    graphs = open_package(package).manifest.graphs.values()
    return [node for graph in graphs for node in onnx.load(package / graph.file, load_external_data=False).graph.node]


def _operators(package: Path) -> set[str]:
    return {node.op_type for node in _nodes(package)}


def _signed(package: Path) -> list[str]:
    """Products of 8-bit weights that overflow on x86 without VNNI, unless whoever runs the graph sets an option."""
    graphs = open_package(package).manifest.graphs.values()
    unsigned = {
        tensor.name
        for graph in graphs
        for tensor in onnx.load(package / graph.file, load_external_data=False).graph.initializer
        if tensor.data_type == onnx.TensorProto.UINT8
    }
    products = [node for node in _nodes(package) if node.op_type == "MatMulIntegerToFloat"]
    assert products
    return [node.name for node in products if not {node.input[1], node.input[5]} <= unsigned]


def _masked(package: Path) -> list[tuple[bool, bool]]:
    """Whether each attention of a package reads a mask of padding, which WebGPU's kernels refuse, and a bias."""
    inputs = [[*node.input, *[""] * 6] for node in _nodes(package) if node.op_type == "MultiHeadAttention"]
    assert inputs
    return [(bool(one[4]), bool(one[5])) for one in inputs]


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gemma3_text", "bloom"))]
)
def test_decoders(family: str, tmp_path: Path) -> None:
    """Tied tables and others, scaled embeddings, both routes: near the base by the export's own proof."""
    assert family in CONFIGS
    report = export_model(loaded_decoder(family), tmp_path / "web", target="web")
    assert report.manifest.target == "web"
    assert report.manifest.precision == "int8"
    assert not _operators(report.path) & SLOW
    assert not _signed(report.path)
    assert report.validation["mean_correlation"] > 0.99


@pytest.mark.parametrize("family", [pytest.param("BERT", marks=pytest.mark.slow), "DistilBERT"])
def test_encoders(family: str, encoder_base: Callable[[str], Path], tmp_path: Path) -> None:
    path = export_model(encoder_base(family), tmp_path / "web", target="web").path
    assert not _operators(path) & SLOW
    assert not _signed(path)
    assert {*_masked(path)} == {(False, True)}
    with edgeprompt.load(path, options=QUIET) as runtime:
        texts = ["the plot is thin", "a", "one two three four five six seven eight nine ten"]
        together = runtime.embed(texts)  # padded
        alone = np.concatenate([runtime.embed([text]) for text in texts])
        assert np.abs(together - alone).max() < 0.02 * np.abs(alone).max()


@pytest.mark.parametrize("family", ["T5", pytest.param("BART", marks=pytest.mark.slow)])
def test_encoder_decoders(family: str, seq2seq_base: Callable[[str], Path], tmp_path: Path) -> None:
    path = export_model(seq2seq_base(family), tmp_path / "web", target="web").path
    assert not _operators(path) & SLOW
    assert not _signed(path)
    assert {*_masked(path)} == {(False, True)}
    with edgeprompt.load(path, options=QUIET) as runtime:
        assert runtime.generate("the plot is thin", max_new_tokens=4).token_ids


def test_weights_in_several_files(tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut or whole, the answers are the same, and so are the weights that a prompt is tuned on."""
    whole = export_model(tiny_llama_base, tmp_path / "whole", target="web").path
    monkeypatch.setattr(layout, "WEB_FILE", 20_000)
    cut = export_model(tiny_llama_base, tmp_path / "cut", target="web").path
    files = open_package(cut).manifest.graphs["model"].data
    assert len(files) > 2
    assert {*files} == {file.name for file in cut.glob("model.onnx.*")}
    sizes = sorted((cut / file).stat().st_size for file in files)
    assert sizes[-3] <= 20_000  # the embedding and the output layer alone have more
    assert len(open_package(whole).manifest.graphs["model"].data) == 1
    answers = []
    for path in (whole, cut):
        open_package(path).verify()
        with edgeprompt.load(path, options=QUIET) as runtime:
            answers.append(runtime.logits("the plot is thin"))
    assert np.array_equal(*answers)
    models = [load_base(tiny_llama_base).model for _ in range(2)]
    for model, path in zip(models, (whole, cut), strict=True):
        load_package_weights(model, path)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.equal(other)
    assert validate_package(cut, against=tiny_llama_base)["mean_correlation"] > 0.99


def test_a_package_of_one_file_has_the_weights_of_the_native_one(tiny_llama_base: Path, tmp_path: Path) -> None:
    native = export_model(tiny_llama_base, tmp_path / "native", precision="fp32").manifest
    web = export_model(tiny_llama_base, tmp_path / "web", precision="fp32", target="web").manifest
    assert (native.target, web.target) == ("native", "web")
    assert native.weights_hash == web.weights_hash
    assert "target" not in json.loads((tmp_path / "native/edgeprompt.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("options", "name", "dtype"),
    [
        ({"target": "web"}, "model_quantized", "q8"),
        ({"precision": "fp32"}, "model", "fp32"),
        ({"precision": "int4"}, "model_q4", "q4"),
        ({"precision": "int8"}, "model_quantized", "q8"),
    ],
)
def test_the_layout_of_transformers_js(
    tiny_llama_base: Path, tmp_path: Path, options: dict[str, Any], name: str, dtype: str
) -> None:
    out = tmp_path / "hub"
    plain = export_model(tiny_llama_base, tmp_path / "plain", **options)
    for force in (False, True):  # the second time in place of the first
        report = export_model(tiny_llama_base, out, layout="hub", force=force, **options)
    if dtype == "q8":
        assert not _signed(out)  # transformers.js runs it as it is, on any processor
    assert report.manifest.graphs["model"].file == "model.onnx"
    assert [*report.manifest.graphs["model"].data] == [f"onnx/{name}.onnx_data"]
    builders = {"genai_config.json"} if (plain.path / "genai_config.json").exists() else set()
    assert {*map(str, (file.relative_to(out) for file in out.rglob("*") if file.is_file()))} == {
        "config.json", "generation_config.json", "edgeprompt.json", "tokenizer.json", "tokenizer_config.json",
        "model.onnx", f"onnx/{name}.onnx", f"onnx/{name}.onnx_data", *builders,
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["model_type"] == "llama"
    assert config["transformers.js_config"] == {"dtype": dtype, "use_external_data_format": {f"{name}.onnx": 1}}
    with edgeprompt.load(out, options=QUIET) as hub, edgeprompt.load(plain.path, options=QUIET) as native:
        assert np.array_equal(hub.logits("the plot is thin"), native.logits("the plot is thin"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "web", "precision": "int4"}, "many times slower than int8"),
        ({"target": "web", "precision": "gguf"}, "use one of int8, fp32, fp16"),
        ({"target": "phone"}, "native, web"),
        ({"layout": "flat"}, "edgeprompt, hub"),
        ({"target": "web", "route": "onnx"}, "keep their operators"),
    ],
)
def test_what_does_not_go_together(tiny_llama_base: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        export_model(tiny_llama_base, tmp_path / "out", **options)
    assert not [*tmp_path.iterdir()]


def test_an_encoder_has_no_place_in_that_layout(encoder_base: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="decoder-only"):
        export_model(encoder_base("BERT"), tmp_path / "out", layout="hub")
    assert not [*tmp_path.iterdir()]
