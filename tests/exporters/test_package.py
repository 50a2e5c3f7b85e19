"""A package's tokenizer: written to load quickly, and the same tokenizer; and packages that could not be loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from edgeprompt.errors import EdgePromptError
from edgeprompt.package.files import fingerprint_tokenizer
from exporters import export_model
from exporters.package import write_tokenizer

VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, " ": 5, " a": 6}


@pytest.mark.parametrize(
    ("merges", "written"),
    [
        ([("a", "b"), ("ab", "c")], ["a b", "ab c"]),
        ([("a", "b"), (" ", "a")], [["a", "b"], [" ", "a"]]),  # a blank in a piece: the short form cannot hold it
    ],
    ids=["short", "with a blank"],
)
def test_merges_are_written_short_where_that_is_the_same(
    tmp_path: Path, merges: list[tuple[str, str]], written: list[object]
) -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=VOCAB, merges=merges))
    (tmp_path / "scratch").mkdir()
    found = write_tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain), tmp_path, tmp_path / "scratch")
    content = (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads(content)["model"]["merges"] == written
    assert found == fingerprint_tokenizer(content)
    again = tokenizers.Tokenizer.from_buffer(content)
    for text in ("abc", "cab ab", "a b c"):
        assert again.encode(text).ids == plain.encode(text).ids


def test_a_model_without_merges_gets_none(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    (tmp_path / "scratch").mkdir()
    write_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), tmp_path, tmp_path / "scratch")
    assert "merges" not in json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]


def test_a_package_that_nothing_can_load_is_told_at_export(tiny_llama_base, tmp_path, caplog):
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    for file in base.glob("*token*"):
        file.unlink()
    with caplog.at_level(logging.WARNING, "edgeprompt"):
        export_model(base, tmp_path / "package", precision="fp32")
    assert "'base' has no tokenizer, so edgeprompt does not load this package" in caplog.text


def test_a_graph_that_onnx_runtime_does_not_load_is_one_line(tiny_llama_base, tmp_path):
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": -1e-6}))
    with pytest.raises(EdgePromptError, match="ONNX Runtime cannot load") as caught:
        export_model(base, tmp_path / "package", precision="fp32")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "package").exists()
