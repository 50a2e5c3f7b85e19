"""int8: columns that stand out in a layer's input are divided by powers of two, and their weights multiplied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeprompt.base.dequantize import dequantize_record, load_package_weights
from edgeprompt.base.load import LoadedBase, load_base
from edgeprompt.errors import DataError, InputError, PackageError, UnsupportedError, ValidationError
from exporters import decoder_only, export_model
from exporters.quantize import equalize as equalizer
from exporters.quantize.observe import Observed, observe
from exporters.validate.weights import check_weights
from tests.support import decoder_models

COLUMN = 7


def with_outliers(family: str, factor: float = 128.0) -> LoadedBase:
    """A random model of which one column of every layer's input stands out: a larger norm, smaller weights."""
    loaded: LoadedBase = decoder_models.loaded_decoder(family)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm), ("gate_proj", "up_proj")),
            ):
                zero = 1.0 if "gemma" in family else 0.0  # Gemma's scales are stored less one
                norm.weight[COLUMN] = (norm.weight[COLUMN] + zero) * factor - zero
                for name, module in layer.named_modules():
                    if name.endswith(readers):
                        module.weight[:, COLUMN] /= factor
            layer.mlp.up_proj.weight[COLUMN] *= factor
            layer.mlp.down_proj.weight[:, COLUMN] /= factor
    return loaded


def unequalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_only, "observe", lambda *_, **__: Observed())


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_outliers_cost_little(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalizer, "MOST_WORTH", 0.0)
    loaded = with_outliers(family)
    good = export_model(loaded, tmp_path / "good", precision="int8", allow_quality_loss=True).manifest
    unequalised(monkeypatch)
    plain = export_model(loaded, tmp_path / "plain", precision="int8", allow_quality_loss=True).manifest
    assert good.validation["mean_difference"] < 0.5 * plain.validation["mean_difference"]
    records = good.extra["weights"]
    divided = {name for record in records if record["factors"] for name, _, _ in record["pieces"]}
    named = {name.rsplit(".", 2)[1] for name in divided}
    # The tiny Gemma's keys and values are too small to be quantised, so its queries read the norm as it was.
    assert named == {"gate_proj", "up_proj", "down_proj"} | (
        {"q_proj", "k_proj", "v_proj"} if family == "llama" else set()
    )
    # No operator of every step is added: what divides is constant.
    operators = [
        {node.op_type: 0 for node in ir.load(tmp_path / name / "model.onnx").graph} for name in ("good", "plain")
    ]
    graph = ir.load(tmp_path / "good" / "model.onnx").graph
    assert set(operators[0]) - set(operators[1]) == {"Div"}
    for node in graph:
        if node.op_type == "Div":
            assert all(value is not None and value.name in graph.initializers for value in node.inputs)


def test_what_is_stored_is_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalizer, "MOST_WORTH", 0.0)
    loaded = with_outliers("llama")
    export_model(loaded, tmp_path / "package", precision="int8", allow_quality_loss=True)
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    found = load_package_weights(loaded.model, tmp_path / "package")
    name = "model.layers.0.mlp.down_proj.weight"
    assert name in found.parameters
    error = (dict(loaded.model.named_parameters())[name] - before[name]).detach()[:, COLUMN]
    # As exact as its neighbours, though it is 128 times smaller than they are.
    assert float(error.norm() / before[name].detach()[:, COLUMN].norm()) < 0.05


@pytest.mark.parametrize("wrong", [0.5, 3.0, 0.0, np.nan])
def test_a_wrong_factor_is_refused(wrong: float, tmp_path: Path) -> None:
    loaded = with_outliers("llama")
    manifest = export_model(loaded, tmp_path / "package", precision="int8", allow_quality_loss=True).manifest
    record = next(one for one in manifest.extra["weights"] if one["factors"])
    model = ir.load(tmp_path / "package" / "model.onnx")
    value = model.graph.initializers[record["factors"]]
    factors: Any = np.array(value.const_value.numpy())
    assert dequantize_record(record, model.graph.initializers).isfinite().all()
    factors[COLUMN] *= wrong
    value.const_value = ir.tensor(factors, name=value.name)
    (tmp_path / "broken").mkdir()
    ir.save(model, tmp_path / "broken" / "model.onnx", external_data="model.onnx.data")
    with pytest.raises(ValidationError if wrong == 0.5 else PackageError):
        check_weights(loaded.model, tmp_path / "broken", manifest)


def test_padding_is_not_observed(tiny_llama_base: Path, tmp_path: Path) -> None:
    loaded = load_base(tiny_llama_base)
    texts = ["A short one.", "This text has more words than the other one, so that one is padded."]
    together, apart = observe(loaded, _lines(tmp_path / "both.txt", texts)), []
    for at, text in enumerate(texts):
        apart.append(observe(loaded, _lines(tmp_path / f"{at}.txt", [text])))
    for name, largest in together.largest.items():
        assert torch.allclose(largest, torch.maximum(*(one.largest[name] for one in apart)), atol=1e-5)


def test_calibration_texts_that_nothing_would_use_are_refused(
    tiny_llama_base: Path, encoder_base: Callable[[str], Path], seq2seq_base: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = _lines(tmp_path / "one.txt", ["Some words.", "More words."])
    with pytest.raises(InputError, match="'fp32' uses no calibration texts"):
        export_model(tiny_llama_base, tmp_path / "package", precision="fp32", calibration=texts)
    with pytest.raises(InputError, match="blocks of 64 are made without calibration texts"):
        export_model(tiny_llama_base, tmp_path / "package", precision="int4", block_size=64, calibration=texts)
    for base in (encoder_base("BERT"), seq2seq_base("T5")):
        with pytest.raises(UnsupportedError, match="calibration is for decoders"):
            export_model(base, tmp_path / "package", precision="int8", calibration=texts)
    assert not (tmp_path / "package").exists()


def test_calibration_texts_are_checked(tiny_llama_base: Path, tmp_path: Path) -> None:
    one, two = _lines(tmp_path / "one.txt", ["Some words.", "More words."]), _lines(tmp_path / "two.txt", ["Others."])
    with pytest.raises(InputError, match="take them out of one"):
        export_model(tiny_llama_base, tmp_path / "package", precision="int8", calibration=one, data=one)
    with pytest.raises(DataError, match="holds no text"):
        export_model(
            tiny_llama_base, tmp_path / "package", precision="int8", calibration=_lines(tmp_path / "no.txt", [""])
        )
    assert not (tmp_path / "package").exists()
    made = export_model(tiny_llama_base, tmp_path / "package", precision="int8", calibration=one, data=two)
    assert made.manifest.quality["source"] == "two.txt"


def _lines(file: Path, texts: list[str]) -> Path:
    file.write_text("\n".join(texts), "utf-8")
    return file


def test_a_column_beyond_all_factors_gets_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalizer, "MOST_WORTH", 0.12)  # one matrix of the two layers
    loaded = with_outliers("llama")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[COLUMN] *= 512
        loaded.model.model.layers[1].mlp.down_proj.weight[:, COLUMN] /= 512
    manifest = export_model(loaded, tmp_path / "package", precision="int8", allow_quality_loss=True).manifest
    layouts = {record["pieces"][0][0]: record["layout"] for record in manifest.extra["weights"]}
    blocks = {name for name, layout in layouts.items() if layout == "blocks" and "layers" in name}
    assert blocks == {"model.layers.1.mlp.down_proj.weight"}
    assert manifest.validation["least_correlation"] > 0.9
    # Its columns have factors too, and it reads back as the base's.
    assert all(record["factors"] for record in manifest.extra["weights"] if record["pieces"][0][0] in blocks)
    name = "model.layers.1.mlp.down_proj.weight"
    before = dict(loaded.model.named_parameters())[name].detach().clone()
    load_package_weights(loaded.model, tmp_path / "package")
    after = dict(loaded.model.named_parameters())[name].detach()
    assert float((after - before).norm() / before.norm()) < 0.02
