"""Grafting graphs that others exported: Optimum's, onnx-community's variants of them, the GenAI builder's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import edgeprompt
from edgeprompt.errors import BaseMismatchError, ExportError, PackageError, SourceError, UnsupportedError
from edgeprompt.prompts.file import PromptFile, save_prompt
from edgeprompt.prompts.template import Template
from exporters import export_model
from exporters.routes.onnx_source import find_source

GOLDEN = Path(__file__).resolve().parents[2] / "golden/onnx"
WIDTH, VOCAB = 16, 512
ARCHITECTURES = {
    "gpt2": "decoder-only",
    "llama": "decoder-only",
    "bert": "encoder-only",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
}


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Optimum's folders with a tokenizer, as their authors publish them; graphs in `onnx/` for llama and bert."""
    home = tmp_path_factory.mktemp("optimum")
    for name in ARCHITECTURES:
        shutil.copytree(GOLDEN / name, home / name)
        tiny_tokenizer.save_pretrained(home / name)
    for name in ("llama", "bert"):
        (home / name / "onnx").mkdir()
        shutil.move(home / name / "model.onnx", home / name / "onnx/model.onnx")
        add_variants(home / name / "onnx/model.onnx")
    return {name: home / name for name in ARCHITECTURES}


VARIANTS = {
    "_quantized": "int8",
    "_int8": "int8",
    "_uint8": "int8",
    "_q4": "int4",
    "_bnb4": "int4",
    "_fp16": "fp16",
    "_q4f16": "int4",
}


def add_variants(graph: Path, *endings: str) -> None:
    """What onnx-community publishes beside a graph, by the tools that it uses; `endings` of file names, or all."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    def four_bits() -> Any:
        quantizer = MatMulNBitsQuantizer(
            onnx.load(graph),
            bits=4,
            block_size=16,
            is_symmetric=True,
            op_types_to_quantize=("MatMul", "Gather"),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it divides by the scale of blocks that are all zero
            quantizer.process()
        return quantizer.model.model

    for ending in endings or VARIANTS:
        target = graph.with_name(f"{graph.stem}{ending}.onnx")
        match ending:
            case "_int8":
                quantize_dynamic(
                    graph,
                    target,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    extra_options={"EnableSubgraph": True},
                )
            case "_quantized" | "_uint8":
                quantize_dynamic(graph, target, weight_type=QuantType.QUInt8, extra_options={"EnableSubgraph": True})
            case "_q4":
                onnx.save(four_bits(), target)
            case "_bnb4":
                quantizer = MatMulBnb4Quantizer(onnx.load(graph), MatMulBnb4Quantizer.NF4, 64)
                quantizer.process()
                quantizer.model.save_model_to_file(str(target))
            case "_fp16":
                onnx.save(convert_float_to_float16(onnx.load(graph), disable_shape_infer=True), target)
            case "_q4f16":
                onnx.save(convert_float_to_float16(four_bits(), keep_io_types=True, disable_shape_infer=True), target)


def some_prompt(manifest: Any, path: Path, **tensors: Any) -> Path:
    prompt = PromptFile(
        name=path.stem,
        method="prompt-tuning" if "prompt_embeddings" in tensors else "prefix-tuning",
        task="generate",
        base=manifest.base,
        template=Template.parse("{prompt}{text}" if "prompt_embeddings" in tensors else "{text}"),
        **tensors,
    )
    save_prompt(prompt, path)
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_optimum_graphs_compute_what_pytorch_computes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    report = export_model(folders[name], tmp_path / "out", against=folders[name], route="onnx")
    manifest = report.manifest
    assert (manifest.architecture, manifest.route, manifest.precision) == (ARCHITECTURES[name], "onnx", "fp32")
    assert report.validation["identical"]
    assert report.validation["against_base"]["max_difference"] < 1e-4
    alone = export_model(folders[name], tmp_path / "alone", route="onnx").manifest
    assert alone.base.name == name
    assert alone.base.matches(manifest.base)  # by the graph's own embedding, which is all that it can say
    assert "would not be noticed" in str(alone.base.weaker(manifest.base))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_runtime_serves_a_prompt_on_them(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    manifest = export_model(folders[name], tmp_path / "out", route="onnx").manifest
    rows = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    file = some_prompt(manifest, tmp_path / "soft.safetensors", prompt_embeddings=rows)
    model = (AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM).from_pretrained(folders[name]).eval()
    ids = [5, 9, 21, 7]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        joined = torch.cat([torch.from_numpy(rows)[None], embedded], 1)
        decoder = {"decoder_input_ids": torch.tensor([[manifest.tokens.decoder_start]])} if name == "t5" else {}
        want = model(inputs_embeds=joined, **decoder).logits[0, -1].numpy()
    with edgeprompt.load(tmp_path / "out", provider="cpu", threads=1) as served:
        got = served.logits(input_ids=ids, prompt=served.add_prompt(file))
    assert np.abs(got - want).max() < 1e-4


def test_prefixes_of_different_length_on_a_decoder_without_mask(folders: dict[str, Path], tmp_path: Path) -> None:
    """Optimum's encoder-decoders take no decoder mask, so such rows must not be padded together."""
    manifest = export_model(folders["t5"], tmp_path / "out", route="onnx").manifest
    random = np.random.default_rng(0)
    with edgeprompt.load(tmp_path / "out", provider="cpu", threads=1) as served:
        for count in (2, 5):
            prefix = random.standard_normal((2, 2, 2, count, 8)).astype(np.float32)
            served.add_prompt(some_prompt(manifest, tmp_path / f"p{count}.safetensors", past_key_values=prefix))
        requests = [edgeprompt.Request("the film", prompt=name, task="generate") for name in ("p2", "p5", None)]
        together = [answer.token_ids for answer in served.run(requests)]
        assert together == [served.run([request])[0].token_ids for request in requests]


def test_an_encoder_without_deep_inputs_refuses_a_prefix(folders: dict[str, Path], tmp_path: Path) -> None:
    manifest = export_model(folders["bert"], tmp_path / "out", route="onnx").manifest
    prefix = np.ones((2, 2, 2, 3, 8), np.float32)
    file = some_prompt(manifest, tmp_path / "deep.safetensors", past_key_values=prefix)
    with edgeprompt.load(tmp_path / "out", provider="cpu") as served, pytest.raises(UnsupportedError, match="torch"):
        served.add_prompt(file)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("ending", VARIANTS)
def test_variants_keep_their_weights(name: str, ending: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source, precision = folders[name] / f"onnx/model{ending}.onnx", VARIANTS[ending]
    # Tiny random models lose much in other tools' 4 and 8 bits; what counts here is that grafting loses nothing more.
    report = export_model(
        source, tmp_path / "out", precision=precision, route="onnx", against=GOLDEN / name, allow_quality_loss=True
    )
    assert report.manifest.precision == precision
    assert report.manifest.extra["source_graphs"] == {"model": source.name}
    # Where half precision is widened for an operator, ONNX Runtime rounds elsewhere behind new nodes.
    assert report.validation["identical"] or (ending == "_q4f16" and report.validation["max_half_difference"] < 1e-2)
    before, after = (weights(path) for path in (source, tmp_path / "out/model.onnx"))
    assert before.items() <= after.items()
    assert all(key.startswith("virtual/") for key in after.keys() - before.keys())


@pytest.mark.parametrize(("precision", "file"), [("int8", "quantized"), ("int4", "q4"), ("fp16", "fp16")])
def test_a_folder_gives_the_variant_of_the_precision(
    precision: str, file: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = find_source(folders["llama"], precision)
    assert {key: path.name for key, path in found.graphs.items()} == {"model": f"model_{file}.onnx"}


@pytest.mark.parametrize("ending", VARIANTS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_variants_of_encoder_decoders(name: str, ending: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """T5's three files and BART's merged decoder, whose branches share what one of them quantises."""
    if (name, ending) == ("bart", "_q4f16"):
        pytest.skip("ONNX Runtime's float16 tool breaks a merged decoder that keeps its inputs' types")
    shutil.copytree(folders[name], tmp_path / "source")
    for graph in list((tmp_path / "source").glob("*.onnx")):
        add_variants(graph, ending)
        graph.unlink()
    # Rows of 16 weights are few for 4 bits: this T5 is then no longer near its base.
    against = None if (name, VARIANTS[ending]) == ("t5", "int4") else GOLDEN / name
    shutil.copy(GOLDEN / name / "encoder_model.onnx", tmp_path / "source/encoder_model.onnx")
    source = tmp_path / f"source/encoder_model{ending}.onnx"
    report = export_model(source, tmp_path / "out", route="onnx", against=against, allow_quality_loss=True)
    assert report.manifest.precision == VARIANTS[ending]
    assert all(ending in file for file in report.manifest.extra["source_graphs"].values())
    assert report.validation["identical"] or (ending == "_q4f16" and report.validation["max_half_difference"] < 1e-2)


def weights(path: Path) -> dict[str, bytes]:
    model = onnx.load(path)
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}


def test_fingerprint_of_a_quantised_graph(folders: dict[str, Path], tmp_path: Path) -> None:
    beside = export_model(folders["bert"], tmp_path / "out", precision="int8", route="onnx").manifest
    assert (
        beside.base.fingerprint
        == export_model(folders["bert"], tmp_path / "fp32", route="onnx").manifest.base.fingerprint
    )
    shutil.copytree(folders["bert"], tmp_path / "alone")
    for file in ("model.onnx", "model_fp16.onnx", "model_q4f16.onnx"):
        (tmp_path / "alone/onnx" / file).unlink()
    with pytest.raises(SourceError, match="give --against BASE"):
        export_model(tmp_path / "alone", tmp_path / "no", precision="int8", route="onnx")
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def builder_folder(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m onnxruntime_genai.models.builder` writes at int4."""
    home = tmp_path_factory.mktemp("builder")
    command = [sys.executable, "-W", "ignore", "-m", "onnxruntime_genai.models.builder", "-i", str(tiny_llama_base)]
    done = subprocess.run(
        [*command, "-o", str(home / "out"), "-p", "int4", "-e", "cpu", "-c", str(home / "cache")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return home / "out"


@pytest.mark.parametrize("prompt_input", ["required", "optional"])
def test_genai_builder_folder(prompt_input: str, builder_folder: Path, tiny_llama_base: Path, tmp_path: Path) -> None:
    report = export_model(
        builder_folder,
        tmp_path / "out",
        precision="int4",
        route="onnx",
        against=tiny_llama_base,
        prompt_input=prompt_input,
    )
    assert report.validation["identical"]
    assert (report.manifest.precision, report.manifest.model_type, report.manifest.prompt_input) == (
        "int4",
        "llama",
        prompt_input,
    )
    assert (tmp_path / "out/genai_config.json").exists()
    with edgeprompt.load(tmp_path / "out", provider="cpu", threads=1) as served:
        rows = np.ones((2, 64), np.float32)
        name = served.add_prompt(some_prompt(report.manifest, tmp_path / "ones.safetensors", prompt_embeddings=rows))
        plain, prompted = served.logits(input_ids=[5, 6]), served.logits(input_ids=[5, 6], prompt=name)
        assert not np.allclose(plain, prompted)


@pytest.mark.parametrize("ending", ["", "_quantized", "_q4"])
def test_a_merged_decoder_only_model(ending: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gpt2-merged", tmp_path / "source")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    graph = tmp_path / "source/decoder_model_merged.onnx"
    if ending:
        add_variants(graph, ending)
        graph.unlink()
    report = export_model(tmp_path / "source", tmp_path / "out", route="onnx", against=GOLDEN / "gpt2")
    assert report.validation["identical"]
    rows = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    with edgeprompt.load(tmp_path / "out", provider="cpu", threads=1) as served:
        assert served.generate(input_ids=[5, 9, 21], max_new_tokens=4).token_ids
        file = some_prompt(report.manifest, tmp_path / "soft.safetensors", prompt_embeddings=rows)
        assert served.logits(input_ids=[5], prompt=served.add_prompt(file)).shape == (VOCAB,)


def test_a_merged_decoder_is_found() -> None:
    found = find_source(GOLDEN / "bart", "fp32")
    assert {key: path.name for key, path in found.graphs.items()} == {
        "encoder": "encoder_model.onnx",
        "merged": "decoder_model_merged.onnx",
    }


def test_what_cannot_be_grafted_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    def graph(name: str, outputs: list[str], readers: list[Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(folders["bert"] / "config.json", folder)
        info = [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "length"])]
        ends = [onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None) for out in outputs]
        table = onnx.numpy_helper.from_array(np.ones((VOCAB, WIDTH), np.float32), "table")
        model = onnx.helper.make_graph(readers, "g", info, ends, [table])
        onnx.save(onnx.helper.make_model(model), folder / "model.onnx")
        return folder

    look = onnx.helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    with pytest.raises(ExportError, match="neither a decoder with a cache"):
        export_model(graph("classifier", ["logits"], [look]), tmp_path / "no", route="onnx")
    cast = onnx.helper.make_node("Cast", ["input_ids"], ["last_hidden_state"], to=1)
    with pytest.raises(ExportError, match="expected one embedding node"):
        export_model(graph("no-embedding", ["last_hidden_state"], [cast]), tmp_path / "no", route="onnx")
    (tmp_path / "broken").mkdir()
    shutil.copy(folders["bert"] / "config.json", tmp_path / "broken")
    (tmp_path / "broken/model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(SourceError, match="cannot read graph"):
        export_model(tmp_path / "broken", tmp_path / "no", route="onnx")
    assert not (tmp_path / "no").exists()


def test_missing_graphs_and_configs(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(GOLDEN / "bert/config.json", tmp_path / "empty")
    with pytest.raises(SourceError, match=r"looked for model, .* found no \.onnx file"):
        export_model(tmp_path / "empty", tmp_path / "no", route="onnx")
    (folders["llama"] / "onnx/model_fp16.onnx").rename(tmp_path / "model_fp16.onnx")
    with pytest.raises(SourceError, match=r"precision fp16.* found model\.onnx, model_bnb4\.onnx"):
        export_model(folders["llama"], tmp_path / "no", route="onnx", precision="fp16")
    (tmp_path / "model_fp16.onnx").rename(folders["llama"] / "onnx/model_fp16.onnx")
    (tmp_path / "bare").mkdir()
    shutil.copy(GOLDEN / "bert/model.onnx", tmp_path / "bare")
    with pytest.raises(SourceError, match=r"no config\.json"):
        export_model(tmp_path / "bare", tmp_path / "no", route="onnx")
    other = json.loads((GOLDEN / "bert/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps({**other, "vocab_size": 600}))
    with pytest.raises(BaseMismatchError, match="512 rows, the config says vocab_size 600"):
        export_model(tmp_path / "bare", tmp_path / "no", route="onnx")
    with pytest.raises((BaseMismatchError, PackageError), match="fingerprint"):
        export_model(folders["gpt2"], tmp_path / "no", route="onnx", against=folders["llama"])


def test_external_data_stays_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(GOLDEN / "bert/config.json", tmp_path / "source")
    model = onnx.load(GOLDEN / "bert/model.onnx")
    table = next(tensor for tensor in model.graph.initializer if tensor.dims[:1] == [VOCAB])
    (tmp_path / "secret.bin").write_bytes(onnx.numpy_helper.to_array(table).tobytes())
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    table.external_data.add(key="location", value="../secret.bin")
    (tmp_path / "source/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="outside the base directory"):
        export_model(tmp_path / "source", tmp_path / "out", route="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["hub cache", "symbolic link", "hard link"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_linked_external_data(name: str, link: str, tmp_path: Path) -> None:
    """A hub cache's snapshot holds links only; `cp -l` and other tools link the large files alone."""
    source, blobs = tmp_path / "source", tmp_path / "blobs"
    source.mkdir()
    blobs.mkdir()
    for file in (GOLDEN / name).iterdir():
        if file.suffix == ".onnx":
            onnx.save(
                onnx.load(file),
                blobs / file.name,
                save_as_external_data=True,
                location=f"{file.name}_data",
                size_threshold=100,
            )
        elif file.is_file():
            shutil.copy(file, blobs / file.name)
    for file in blobs.iterdir():
        if link == "hub cache" or (link == "symbolic link" and file.suffix == ".onnx_data"):
            (source / file.name).symlink_to(file)
        elif link == "hard link" and file.suffix == ".onnx_data":
            os.link(file, source / file.name)
        else:
            shutil.copy(file, source / file.name)
    report = export_model(source, tmp_path / "out", route="onnx", against=GOLDEN / name)
    assert report.validation["identical"]
    assert report.validation["against_base"]["max_difference"] < 1e-4
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
