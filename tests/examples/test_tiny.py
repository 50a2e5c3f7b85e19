"""The worked example's small models: two training steps make them bases that edgeprompt reads."""

import csv
import sys
from pathlib import Path

import pytest

from edgeprompt import names
from edgeprompt.base.geometry import tokens_of
from edgeprompt.base.load import load_base

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny

    with (EXAMPLES / "data" / "movie.train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"], "movie") for row in csv.DictReader(file)]
    monkeypatch.setattr(tiny, "sentences", lambda: rows)
    yield tiny
    for name in ("tiny", "models"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("kind", "architecture", "words"),
    [("bert", names.ENCODER_ONLY, (" great", " terrible")), ("t5", names.ENCODER_DECODER, (" positive", " negative"))],
)
def test_a_small_model_is_a_base(kind, architecture, words, tiny, tmp_path):
    getattr(tiny, kind)(tmp_path / kind, steps=2)
    loaded = load_base(tmp_path / kind)
    assert loaded.family.architecture == architecture
    assert [len(loaded.tokenizer.encode(word, add_special_tokens=False)) for word in words] == [1, 1]
    if kind == "bert":
        assert loaded.model is not loaded.model.base_model  # it fills masks
        assert tokens_of(loaded.config, None, loaded.tokenizer).mask == tiny.MASK
