"""A package of other weights is refused before a prompt is tuned for it, whatever its fingerprint covers."""

import copy
import dataclasses

import pytest
import torch

from edgeprompt.base.dequantize import load_package_weights
from edgeprompt.base.load import load_base
from edgeprompt.errors import BaseMismatchError
from edgeprompt.package.folder import open_package
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.tuner import tune
from exporters import export_model
from tests.base.test_fingerprint import old_format

ROWS = [{"text": f"text {number}", "label": ("good", "bad")[number % 2]} for number in range(12)]


@pytest.fixture(scope="module")
def base(tiny_llama_base):
    return load_base(tiny_llama_base)


@pytest.fixture(scope="module")
def packages(base, tmp_path_factory):
    home = tmp_path_factory.mktemp("packages")
    return {precision: export_model(base, home / precision, precision=precision).path for precision in ("fp32", "int4")}


def trained_on(base):
    """The same embedding, other matrices: what fine-tuning for long leaves."""
    torch.manual_seed(7)
    other = dataclasses.replace(base, model=copy.deepcopy(base.model))
    for name, parameter in other.model.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            parameter.data.copy_(torch.randn_like(parameter) * parameter.std())
    return other


def aged(package, base):
    """The package as an earlier version wrote it: its fingerprint covers the embedding alone."""
    manifest = open_package(package).manifest
    before = manifest.to_json()
    dataclasses.replace(manifest, base=old_format(base.model)).write(package)
    return before


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_its_own_weights_go_in_again_and_again(precision, base, packages):
    model = copy.deepcopy(base.model)
    first = load_package_weights(model, packages[precision])
    second = load_package_weights(model, packages[precision])
    assert second.largest_change <= first.largest_change


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_other_weights_are_refused(precision, base, packages, tmp_path):
    options = TuneOptions(package=packages[precision], steps=2, num_virtual_tokens=4)
    with pytest.raises(BaseMismatchError, match="fine-tuned or merged"):
        tune(trained_on(base), ROWS, output=tmp_path / "p.safetensors", options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "says"), [("int4", "holds other weights"), ("fp32", "next token agrees in")])
def test_an_old_package_of_other_weights_is_refused_too(precision, says, base, packages, tmp_path, caplog):
    before = aged(packages[precision], base)
    options = TuneOptions(package=packages[precision], steps=2, num_virtual_tokens=4)
    try:
        tune(dataclasses.replace(base, model=copy.deepcopy(base.model)), ROWS, output=tmp_path / "p.safetensors",
             options=options, progress=False)  # fmt: skip
        assert "would not be noticed" in caplog.text, "an old package is read, and said to be weaker"
        (tmp_path / "p.safetensors").unlink()
        with pytest.raises(BaseMismatchError, match=says):
            tune(trained_on(base), ROWS, output=tmp_path / "p.safetensors", options=options)
        assert not list(tmp_path.iterdir())
    finally:
        (packages[precision] / "edgeprompt.json").write_text(before)


def test_a_package_in_a_hub_cache_gives_its_weights(base, packages, tmp_path):
    """There, every file of a snapshot is a link into `blobs`, which onnx_ir alone rejects."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted(packages["int4"].iterdir())):
        blob = tmp_path / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(blob)
    plain, linked = (copy.deepcopy(base.model) for _ in range(2))
    load_package_weights(plain, packages["int4"])
    load_package_weights(linked, tmp_path / "snapshot")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, linked.state_dict()[name]), name
