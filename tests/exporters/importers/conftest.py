"""Bases and packages that the importers' tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).resolve().parents[2] / "golden/foreign"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints that other tools wrote, with the bases they are for."""
    return GOLDEN


@pytest.fixture(scope="session")
def pooled_bert_base(save_tiny: Callable[..., Path]) -> Path:
    """A random BERT with a pooler."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return save_tiny(BertModel(config))


@pytest.fixture(scope="session")
def bases(pooled_bert_base: Path, tiny_llama_base: Path) -> dict[str, Path]:
    """Base folders by name."""
    found = {name: GOLDEN / name for name in ("gpt2", "bert", "roberta", "t5")}
    return {**found, "pooled-bert": pooled_bert_base, "llama": tiny_llama_base}


@pytest.fixture(scope="session")
def package(
    bases: dict[str, Path], tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`package(name)`: a base's fp32 package, exported once."""
    from exporters import export_model

    made: dict[str, Path] = {"llama": tiny_llama_package}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = export_model(bases[name], tmp_path_factory.mktemp("packages") / name).path
        return made[name]

    return get


@pytest.fixture(scope="session")
def runtime(package: Callable[[str], Path]) -> Any:
    """`runtime(name)`: a base's package, loaded once."""
    import edgeprompt

    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = edgeprompt.load(package(name), provider="cpu", threads=1)
        return loaded[name]

    yield get
    for one in loaded.values():
        one.close()
