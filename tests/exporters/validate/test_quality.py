"""The gate: broken weights are refused, whatever the precision and architecture, and so is a package that says too
little of what its base says."""

import contextlib
import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from edgeprompt.base.decoder_graph import DecoderGraph
from edgeprompt.base.families import find_family
from edgeprompt.base.load import LoadedBase, load_base
from edgeprompt.cli import main
from edgeprompt.errors import DataError, ValidationError
from edgeprompt.package.folder import open_package
from exporters import export_model, validate_package
from exporters.package import hash_graphs
from exporters.validate import core, decoder, encoder, onnx_base, quality, seq2seq
from exporters.validate.quality import (
    Prediction,
    gate,
    in_words,
    judging_texts,
    measure_quality,
    shipped_texts,
    warning,
    with_quality,
)
from tests.support.decoder_models import loaded_decoder

ROOT = Path(__file__).parents[3]
LOST = {"texts": 32, "kl_mean": 0.3, "kl_p90": 0.2, "kl_worst": 0.9, "top1": 0.7, "perplexity": 40.0,
        "perplexity_base": 30.0}  # fmt: skip


def zeros(array):
    array[:] = 0


def transposed_block(array):
    part = array[:16, :16] if array.ndim == 2 else array[:16].reshape(16, -1)[:, :16]
    part[:] = part.T.copy()


def wrong_scale(array):
    array[: max(1, len(array) // 4)] *= 3


BREAKS = {"zeros": zeros, "a transposed block": transposed_block, "a wrong scale": wrong_scale}


@pytest.fixture(scope="module")
def packages(tiny_llama_base, encoder_base, seq2seq_base, tmp_path_factory) -> Callable:
    """`packages(architecture, precision)`: a base, and its package made once."""
    bases = {"decoder": tiny_llama_base, "encoder": encoder_base("BERT"), "encoder-decoder": seq2seq_base("T5")}
    made = {}

    def make(architecture, precision):
        if (architecture, precision) not in made:
            out = tmp_path_factory.mktemp("quality") / "package"
            loaded = load_base(bases[architecture])
            export_model(loaded, out, precision=precision)
            made[architecture, precision] = loaded, out
        return made[architecture, precision]

    return make


def broken(package, out, record, how):
    """A copy of a package with one array of one weight changed, and a manifest that says so."""
    shutil.copytree(package, out)
    manifest = open_package(out).manifest
    for graph in manifest.graphs.values():
        model = ir.load(package / graph.file)
        name = record["scales" if how == "a wrong scale" else "codes"]
        if name not in model.graph.initializers:
            continue
        array = np.array(model.graph.initializers[name].const_value.numpy())
        before = array.copy()
        BREAKS[how](array)
        assert not np.array_equal(before, array)
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        ir.save(model, out / graph.file, external_data=f"{graph.file}.data", size_threshold_bytes=1024)
    graphs = hash_graphs({key: graph.file for key, graph in manifest.graphs.items()}, out)
    dataclasses.replace(manifest, graphs=graphs).write(out)
    return out


def records_of(package):
    found = open_package(package).manifest.extra["weights"]
    return [record for part in (found.values() if isinstance(found, dict) else [found]) for record in part]


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_one_broken_matrix_is_refused(packages, tmp_path, architecture, precision, how):
    loaded, package = packages(architecture, precision)
    records = records_of(package)
    for at in {0, len(records) // 2}:
        wrong = broken(package, tmp_path / str(at), records[at], how)
        with pytest.raises(ValidationError):
            validate_package(wrong, against=loaded)


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_one_broken_parameter_that_is_not_quantised_is_refused(packages, tmp_path, architecture, precision):
    """A bias that is lost, or a norm or table of twice its size, correlates well and costs little KL divergence."""
    if architecture == "decoder":  # with norms and biases of values of their own
        loaded = loaded_decoder("qwen2")
        package = export_model(loaded, tmp_path / "package", precision=precision).path
    else:
        loaded, package = packages(architecture, precision)
    manifest = open_package(package).manifest
    quantised = {piece[0] for record in records_of(package) for piece in record["pieces"]}
    with torch.no_grad():
        rest = {name: value.numpy() for name, value in loaded.model.named_parameters() if name not in quantised}
    assert any(value.ndim == 1 for value in rest.values())
    changes = (
        lambda a: a * 0,
        lambda a: a * 2,
        lambda a: np.where(np.arange(a.size).reshape(a.shape) < a.size / 4, 0, a),
    )
    broken = 0
    for graph in manifest.graphs.values():
        model = ir.load(package / graph.file)
        for name, value in model.graph.initializers.items():
            array = value.const_value.numpy()
            mine = [
                want
                for want in rest.values()
                if want.size == array.size and np.array_equal(want.ravel(), array.ravel())
            ]
            if len(mine) != 1:  # another copy is whole: tiny models have equal norms
                continue
            changed = changes[broken % 3](array).astype(array.dtype)
            if np.array_equal(changed, array):
                continue
            out = shutil.copytree(package, tmp_path / str(broken))
            again = ir.load(package / graph.file)
            again.graph.initializers[name].const_value = ir.tensor(changed, name=name)
            ir.save(again, out / graph.file, external_data=f"{graph.file}.data", size_threshold_bytes=1024)
            graphs = hash_graphs({key: one.file for key, one in manifest.graphs.items()}, out)
            dataclasses.replace(manifest, graphs=graphs).write(out)
            with pytest.raises(ValidationError, match="holds no copy of the base's"):
                validate_package(out, against=loaded)
            broken += 1
            if broken == 4:
                return
    assert broken


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_package_says_how_near_it_is(packages, architecture, precision):
    _, package = packages(architecture, precision)
    manifest = open_package(package).manifest
    assert manifest.quality_gate == "passed"
    assert {"texts", "kl_mean", "kl_p90", "top1", "perplexity", "perplexity_base"} <= set(manifest.quality)
    assert manifest.quality["texts"] == len(shipped_texts("judging.txt"))
    assert manifest.validation["weights"]["matrices"] == len(records_of(package))


def test_texts_that_judge_and_texts_that_calibrate_are_others():
    judging, calibration = (shipped_texts(f"{name}.txt") for name in ("judging", "calibration"))
    assert len(set(judging)) == len(judging) >= 32
    assert not set(judging) & set(calibration)


def test_figures_are_those_of_the_definition(tiny_llama_package, tiny_tokenizer):
    manifest = open_package(tiny_llama_package).manifest
    got, want = (
        np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]], np.float32)),
        np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.4, 0.4]], np.float32)),
    )

    def predictions(ids):
        yield from (Prediction(g + 3, w, 2) for g, w in zip(got, want, strict=True))

    found = measure_quality(predictions, tiny_tokenizer, manifest)
    divergence = 0.25 * np.log(0.25 / 0.5) + 0.5 * np.log(0.5 / 0.25)
    assert found["kl_mean"] == pytest.approx(divergence / 2, rel=1e-3)
    assert found["kl_p90"] == pytest.approx(divergence, rel=1e-3)
    assert found["top1"] == 0.5
    assert found["perplexity"] == pytest.approx((0.25 * 0.4) ** -0.5, rel=1e-3)
    assert "50 of 100 next tokens" in in_words(found)


def test_the_gate(tiny_llama_package):
    manifest = dataclasses.replace(open_package(tiny_llama_package).manifest, precision="int4")
    with pytest.raises(ValidationError, match=r"keeps 70 of 100 next tokens.*--precision int8.*--allow-quality-loss"):
        gate(LOST, manifest, allow=False)
    assert gate(LOST, manifest, allow=True) == "allowed"
    # One bad text among good ones counts.
    with pytest.raises(ValidationError, match="worst text"):
        gate({**LOST, "kl_mean": 0.01, "kl_worst": 1.2}, manifest, allow=False)
    with pytest.raises(ValidationError):
        gate({**LOST, "kl_mean": float("nan")}, manifest, allow=False)
    between = {**LOST, "kl_mean": 0.05}
    assert gate(between, manifest, allow=False) == "passed"
    assert "\n" not in (warning(between, manifest) or "\n")
    assert warning({**between, "kl_mean": 0.01, "kl_p90": 0.02, "kl_worst": 0.1}, manifest) is None
    with pytest.raises(ValidationError, match=r"correlates by 0\.140"):
        gate({**between, "least_correlation": 0.14, "perplexity_base": 500.0}, manifest, allow=False)
    for spread in (0.5, 2.0):
        with pytest.raises(ValidationError, match="times as far apart as PyTorch's"):
            gate({**between, "farthest_spread": spread}, manifest, allow=False)
    # What knows nothing of the text has nothing there to lose.
    assert gate({**LOST, "perplexity_base": 500.0}, manifest, allow=False) == "passed"


def cli(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def learned(tiny_gpt2_base, tmp_path_factory):
    """A tiny GPT-2 that has learned which tokens are frequent, so that it has something to lose."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(tiny_gpt2_base) for auto in (AutoModelForCausalLM, AutoTokenizer))
    with (ROOT / "examples/data/source.train.csv").open(encoding="utf-8", newline="") as file:
        ids = [tokenizer(row["text"], return_tensors="pt").input_ids[:, :64] for row in csv.DictReader(file)]
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in ids[:80]:
        if row.shape[1] > 2:
            optimizer.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("learned")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_package_beyond_a_limit_is_not_written_unless_it_is_allowed(learned, tmp_path, monkeypatch):
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(shipped_texts("calibration.txt")[:20]).replace("\\n", " "), "utf-8")
    out = tmp_path / "package"
    assert cli("export", learned, "-o", tmp_path / "int8", "--precision", "int8", "--data", data).exit_code == 0
    good = open_package(tmp_path / "int8").manifest
    assert (good.quality_gate, good.quality["source"]) == ("passed", "texts.txt")
    assert good.quality["perplexity_base"] < 0.5 * good.geometry.vocab_size
    # This model's answers hang on its last layer, which has 8 bits: a bound that even that is beyond.
    monkeypatch.setattr(quality, "LIMITS", (quality.Limit("kl_mean", "mean KL divergence", 1e-12, 1e-9),))
    result = cli("export", learned, "-o", out, "--precision", "int4")
    assert result.exit_code == 1
    assert "--allow-quality-loss" in result.stderr
    assert not out.exists()
    result = cli("export", learned, "-o", out, "--precision", "int4", "--allow-quality-loss", "--json")
    assert result.exit_code == 0, result.stderr
    assert "warning" in result.stderr
    said = json.loads(result.stdout)
    assert said["quality_gate"] == open_package(out).manifest.quality_gate == "allowed"
    assert said["quality"]["kl_mean"] > 1e-9
    assert cli("validate", out, "--against", learned).exit_code == 0


def test_data_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "numbers.jsonl").write_text('{"label": 3}\n')
    for file in tmp_path.iterdir():
        with pytest.raises(DataError, match=file.name):
            judging_texts(file)


@pytest.mark.parametrize("block_size", [64, 128])
def test_what_lies_near_zero_beside_a_large_weight_is_rounded_to_it(block_size, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[:, :32] *= 9
    loaded = LoadedBase("near zero", model, None, find_family("llama"))
    out = tmp_path / "package"
    export_model(loaded, out, precision="int4", block_size=block_size, allow_quality_loss=True)
    at = next(at for at, record in enumerate(records_of(out)) if "down_proj" in record["pieces"][0][0])
    for how in BREAKS:
        wrong = broken(out, tmp_path / how, records_of(out)[at], how)
        with pytest.raises(ValidationError):
            validate_package(wrong, against=loaded)


def nan_inside(got):
    got.flat[got.size // 2] = np.nan


def small_noise(got):
    got += np.float32(0.05 * got.std()) * np.random.default_rng(0).standard_normal(got.shape).astype(np.float32)


WRONG = {
    "NaN": nan_inside,
    "infinite": lambda got: got.fill(np.inf),
    "nothing": lambda got: got.fill(0),
    "another sign": lambda got: np.negative(got, out=got),
    "another place": lambda got: got.__setitem__(slice(None), np.roll(got, 1, axis=-1)),
    "a little noise": small_noise,
}


SUBJECTS = {
    "decoder": lambda loaded, package: decoder._Decoder(loaded, DecoderGraph(package.path, package.manifest), ()),
    "encoder": lambda loaded, package: encoder._Encoder(loaded, package.path, package.manifest, ()),
    "encoder-decoder": lambda loaded, package: seq2seq._Seq2Seq(loaded, package, ()),
}


class Replayed:
    def __init__(self, comparisons):
        self.comparisons = lambda: iter(comparisons)
        self.predictions = None


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("architecture", "grafted"), [*((name, False) for name in SUBJECTS), ("decoder", True)], ids=str
)
def test_each_broken_comparison_is_refused(packages, monkeypatch, architecture, grafted, precision):
    """Whichever of all comparisons it is, with any of these faults; a NaN behind the first one used to pass."""
    loaded, path = packages(architecture, precision)
    package = open_package(path)
    subject = (
        onnx_base._Grafted(loaded, path, package.manifest, ()) if grafted else SUBJECTS[architecture](loaded, package)
    )
    seen = list(subject.comparisons())
    assert len(seen) >= 4
    monkeypatch.setattr(core, "check_weights", lambda *_: {})
    monkeypatch.setattr(core, "measure_quality", lambda *_, **__: {"texts": 1})

    def judge(comparisons):
        measured = core.prove(Replayed(comparisons), loaded, path, package.manifest)
        return with_quality(package.manifest, measured, allow=False).quality_gate

    assert judge(seen) == "passed"
    for at, one in enumerate(seen):
        for how, spoil in WRONG.items():
            got = one.got.copy()
            spoil(got)
            if how == "a little noise" and precision != "fp32":
                continue
            passed = ""
            with contextlib.suppress(ValidationError):
                passed = judge([*seen[:at], dataclasses.replace(one, got=got), *seen[at + 1 :]])
            assert not passed, f"comparison {at} of {len(seen)} ({one.what!r}): {how}"


def test_a_comparison_of_small_values_does_not_hide_behind_one_of_large_ones():
    tally = core.Tally()
    large, small = np.full(8, 1000, np.float32), np.linspace(-20, 20, 8, dtype=np.float32)
    tally.add(large, large)
    tally.add(small * np.float32(0.98), small)
    with pytest.raises(ValidationError, match=r"differ from PyTorch's by 0\.4"):
        core._judge("", tally, "fp32")
    with pytest.raises(ValidationError, match=r"has shape \[8\], PyTorch's \[1\]"):
        tally.add(large, large[:1])
