"""Random checkpoints of true sizes, and the memory that an export of one takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.sizes.__main__ import PRECISIONS, decode, measure, table, tune
from benchmarks.sizes.checkpoints import SIZES, architecture_of, make_config, write_checkpoint
from edgeprompt.base.families import known_families
from edgeprompt.base.load import load_base

TOO_WIDE = ("llama-3.2-3b", "qwen2.5-7b", "llama-3-8b")
"""Whose family is there in another size."""


def test_a_checkpoint_has_the_published_sizes_in_shards(tmp_path: Path) -> None:
    count = write_checkpoint("smollm2-135m", tmp_path / "base", layers=1, shard_bytes=20_000_000)
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = load_base(tmp_path / "base", mapped=True)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == count == 31_852_224
    assert loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert 5 < len(loaded.tokenizer.encode("The film starts slowly, but the last half hour is worth it.")) < 25


def test_every_size_is_of_a_family_that_exports() -> None:
    for name, facts in SIZES.items():
        assert facts["model_type"] in known_families()
        depth = next(
            facts[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers") if key in facts
        )
        assert make_config(name).num_hidden_layers == depth


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", [name for name in SIZES if name not in TOO_WIDE])
def test_every_family_exports_decodes_and_tunes_at_its_true_width(name: str, tmp_path: Path) -> None:
    kind = architecture_of(name)
    write_checkpoint(name, tmp_path / "base", layers=2)
    found = measure(tmp_path / "base", tmp_path / "package", PRECISIONS.get(kind, "int8"), "auto")
    assert found["package_bytes"] < found["checkpoint_bytes"]
    assert decode(tmp_path / "package", kind)["tokens"] <= 16
    tune(tmp_path / "base", tmp_path, kind)


@pytest.mark.slow
def test_an_export_takes_far_less_memory_than_the_base_in_float32(tmp_path: Path) -> None:
    count = write_checkpoint("llama-3.2-1b", tmp_path / "base", layers=6)
    found = measure(tmp_path / "base", tmp_path / "package", "int4", "auto")
    assert found["peak_anonymous_bytes"] < 4.0 * count  # float32 alone is that; without streaming it took 7.7
    served = decode(tmp_path / "package")
    assert 1 <= served["tokens"] <= 16
    assert served["peak_anonymous_bytes"] < found["package_bytes"] + 1e9
    used = {
        **found,
        "base": "llama",
        "label": "six layers",
        "decode": served,
        "tune": tune(tmp_path / "base", tmp_path),
    }
    assert f"({served['peak_anonymous_bytes'] / 1e9:.2f}) |" in table([used])
