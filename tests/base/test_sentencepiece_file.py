"""Tokenizers of a SentencePiece model alone have SentencePiece's own ids, or are refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprompt.base.load import read_tokenizer
from edgeprompt.errors import SourceError
from edgeprompt.package.folder import open_package
from edgeprompt.package.tokenizer import Tokenizer
from exporters import export_model
from tests.support.sentencepiece_models import DATA, train

BASES: dict[str, tuple[str, str, dict[str, Any], list[int], list[int]]] = {
    # name: (trained as, file, tokenizer_config.json, ids in front, ids behind)
    "T5": ("t5", "spiece.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}, [], [1]),
    "mT5": ("t5", "spiece.model", {"tokenizer_class": "MT5Tokenizer", "extra_ids": 0}, [], [1]),
    "Pegasus": ("t5", "spiece.model", {"tokenizer_class": "PegasusTokenizer"}, [], [1]),
    "ALBERT": ("albert", "spiece.model", {"tokenizer_class": "AlbertTokenizer"}, [2], [3]),
    "ALBERT, cased": (
        "albert", "spiece.model", {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False, "keep_accents": True},
        [2], [3],
    ),
    "XLM-R": ("xlmr", "sentencepiece.bpe.model", {"tokenizer_class": "XLMRobertaTokenizer"}, [0], [2]),
    "mBART": ("xlmr", "sentencepiece.bpe.model", {"tokenizer_class": "MBartTokenizer"}, [], [2, 484]),
    "DeBERTa": ("albert", "spm.model", {"tokenizer_class": "DebertaV2Tokenizer"}, [2], [3]),
    "Llama": ("llama", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"}, [1], []),
    "Llama without BOS": (
        "llama", "tokenizer.model", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, [], [],
    ),
    "Llama, not legacy": ("llama", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, [1], []),
    "Gemma": ("gemma", "tokenizer.model", {"tokenizer_class": "GemmaTokenizer"}, [480], []),
}  # fmt: skip
OFFSETS = {"Pegasus": 103, "XLM-R": 1, "mBART": 1}
WHITE = ("", " ", " a", "a ", "  a  b  ", "a\n\nb\n", "\tx", "a\u00a0b", "x\r\ny")
NOTED = "gives texts like"
MARKED = (
    "e\u0301\u0302", "a\u0302\u0301", "a\u0323\u0302", "o\u0328\u0304", "x\u0301\u0302", "\u00e9\u0302",
    "E\u0301", "\u03b1\u0313\u0300\u0345", "e\u0323\u0301",
)  # fmt: skip
WRITTEN = (
    "Émile café — …", "e\u0301\u0302 a\u0302\u0301 \u00e9\u0302 o\u0328\u0304a", "E\u0301a", "か\u3099a",
    "Ａｂｃ １２３", "今天很好", "🙂 ok", "a<b>c", "x\u200by", "ﬁne 1,234, ²",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(kind: str, file: str, config: dict[str, Any], model_type: str = "") -> Path:
        home = tmp_path / "base"
        home.mkdir()
        (home / file).write_bytes(train(kind))
        (home / "tokenizer_config.json").write_text(json.dumps(config))
        (home / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        return home

    return make


def expected(kind: str, name: str, text: str) -> list[int]:
    """What SentencePiece says of a text, cleaned as ALBERT's slow tokenizer does it."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=train(kind))
    if not name.startswith("ALBERT"):
        pieces = processor.encode(text, out_type=str)
    else:
        text = " ".join(text.split()).replace("``", '"').replace("''", '"')
        if name == "ALBERT":
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()
        pieces = []
        for piece in processor.encode(text, out_type=str):
            number = len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
            pieces += [*processor.encode(piece[:-1].lstrip("\u2581"), out_type=str), ","] if number else [piece]
    offset = OFFSETS.get(name, 0)
    unknown = {"Pegasus": 105, "XLM-R": 3, "mBART": 3}.get(name, processor.unk_id())
    found = [processor.piece_to_id(piece) for piece in pieces]
    return [unknown if index == processor.unk_id() else index + offset for index in found]


@pytest.mark.parametrize("name", BASES)
def test_ids_are_sentencepieces_own(name: str, folder: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    kind, file, config, front, behind = BASES[name]
    home = folder(kind, file, config)
    found = read_tokenizer("the base", home)
    assert found is not None
    found.save_pretrained(home / "saved")
    tokenizer = Tokenizer(home / "saved")
    with (DATA / "movie.test.csv").open(encoding="utf-8", newline="") as rows:
        texts = [row["text"] for row in csv.DictReader(rows)]
    assert len(texts) == 120
    for text in (*texts, *WHITE, *WRITTEN):
        wanted = [*front, *expected(kind, name, text), *behind]
        assert tokenizer.encode(text) == wanted, text
        assert found(text)["input_ids"] == wanted, text
    assert all(NOTED in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, BASES[name][0]) for name in BASES), ("Llama", "llama with a table")]
)
def test_no_mark_of_a_letter_is_lost(
    name: str, kind: str, folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Vietnamese, Yoruba or Greek as some systems write them: letters and marks one by one."""
    import sentencepiece

    _, file, config, _, _ = BASES[name]
    home = folder(kind, file, config)
    data = train(kind, tuple(f"{text} q{text}q {text[-1]}" for text in MARKED), 640)
    (home / file).write_bytes(data)
    found = read_tokenizer("the base", home)
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in (*MARKED, *(f"q{text}q" for text in MARKED), " ".join(MARKED)):
        if name == "ALBERT":
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()
        ids = [piece + OFFSETS.get(name, 0) for piece in processor.encode(text)]
        assert name == "ALBERT" or processor.unk_id() not in processor.encode(text), ascii(text)
        assert found.backend_tokenizer.encode(text, add_special_tokens=False).ids == ids, ascii(text)
    odd = "qA\uff21\u0301q"
    same = found.backend_tokenizer.encode(odd, add_special_tokens=False).ids == [
        piece + OFFSETS.get(name, 0) for piece in processor.encode(odd)
    ]
    if not same and name != "ALBERT":  # whose slow tokenizer drops marks
        assert any(NOTED in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_a_llama_model_without_a_named_class_is_read_as_llamas(model_type: str, folder: Callable[..., Path]) -> None:
    home = folder("llama", "tokenizer.model", {}, model_type)
    found = read_tokenizer("the base", home)
    for text in ("The film was good.", " a", "  a  b "):
        assert found(text)["input_ids"] == [1, *expected("llama", "", text)]


@pytest.mark.parametrize(
    ("kind", "file", "config", "told"),
    [
        ("t5", "tokenizer.model", {"tokenizer_class": "Qwen2Tokenizer"}, "other ids than SentencePiece"),
        ("t5", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"}, "other ids than SentencePiece"),
        ("albert", "spiece.model", {"tokenizer_class": "BertTokenizer"}, "makes no tokenizer"),
    ],
)
def test_another_familys_rules_are_refused(
    kind: str, file: str, config: dict[str, Any], told: str, folder: Callable[..., Path]
) -> None:
    with pytest.raises(SourceError, match=rf"{told}.*put the model's tokenizer.json beside it"):
        read_tokenizer("the base", folder(kind, file, config))


@pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model"])
@pytest.mark.parametrize("data", [b"IQ== 0\nIg== 1\n", b"\x08", train("llama")[:1000]])
def test_a_file_of_another_kind_is_refused_without_talk_of_tiktoken(
    file: str, data: bytes, folder: Callable[..., Path]
) -> None:
    home = folder("llama", file, {"tokenizer_class": "LlamaTokenizer"}, "llama")
    (home / file).write_bytes(data)
    with pytest.raises(SourceError, match=r"no SentencePiece model|without pieces|other ids|the id") as error:
        read_tokenizer("the base", home)
    assert "tiktoken is required" not in str(error.value)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize("file", ["tekken.json", "tiktoken.model", "tokenizer.tiktoken"])
def test_tokenizers_that_are_not_read_are_named(file: str, folder: Callable[..., Path]) -> None:
    home = folder("llama", "tokenizer.model", {}, "llama")
    (home / "tokenizer.model").unlink()
    (home / file).write_text("{}")
    with pytest.raises(SourceError, match=f"is {file}, of which no tokenizer.json is made here"):
        read_tokenizer("the base", home)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("file", ["tokenizer.model", "config.json", "tokenizer_config.json"])
def test_a_pipe_is_not_waited_for(file: str, folder: Callable[..., Path]) -> None:
    home = folder("llama", "tokenizer.model", {}, "llama")
    (home / file).unlink()
    os.mkfifo(home / file)
    with pytest.raises(SourceError, match="it is a pipe"):
        read_tokenizer("the base", home)


def test_a_package_of_it_answers(tiny_llama_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    for file in base.glob("token*"):
        file.unlink()
    (base / "tokenizer.model").write_bytes(train("llama"))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    package = export_model(base, tmp_path / "package").path
    ids = open_package(package).tokenizer.encode("  the film")
    assert ids == [1, *expected("llama", "", "  the film")]
