"""`--precision gguf`: every matrix keeps the bits and the grid that the file gives it."""

import dataclasses

import pytest
import torch

from edgeprompt.base.load import load_base
from edgeprompt.errors import InputError
from edgeprompt.package.folder import open_package
from exporters import export_model
from exporters.export import default_precision


def grid(weight, levels, offset):
    """A weight on the grid of a file: `levels` steps to each side for 32 columns, perhaps off zero."""
    blocks = weight.reshape(-1, 32)
    step = (blocks.abs().amax(1, keepdim=True).clamp(min=1e-4) / levels).half().float()
    return (torch.round(blocks / step) * step + step * offset).reshape(weight.shape)


def test_each_matrix_keeps_its_bits(tiny_llama_base, tmp_path):
    loaded = load_base(tiny_llama_base)
    stored = {}
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.dim() == 2:
                four = "mlp" in name
                stored[name] = "Q4_0" if four else "Q8_0" if "embed" in name else "Q5_0"
                parameter.copy_(grid(parameter, 7 if four else 127 if "embed" in name else 16, 0))
    loaded = dataclasses.replace(loaded, stored=stored)
    assert default_precision(loaded) == "gguf"
    manifest = export_model(loaded, tmp_path / "package").manifest
    assert manifest.precision == "gguf"
    records = open_package(tmp_path / "package").manifest.extra["weights"]
    bits = {name: record["bits"] for record in records for name, _, _ in record["pieces"]}
    assert bits == {name: 4 if kind == "Q4_0" else 8 for name, kind in stored.items() if name in bits}
    assert {4, 8} == set(bits.values())
    # What is left is the rounding of offsets: none where the grid has no offset.
    assert manifest.validation["weights"]["largest_error"] < 1e-3


def test_the_mode_is_for_gguf_files(tiny_llama_base, tmp_path):
    assert default_precision("model.Q4_K_M.gguf") == "gguf"
    assert default_precision(tiny_llama_base) == "fp32"
    with pytest.raises(InputError, match=r"\.gguf file"):
        export_model(tiny_llama_base, tmp_path / "package", precision="gguf")
    assert not list(tmp_path.iterdir())
