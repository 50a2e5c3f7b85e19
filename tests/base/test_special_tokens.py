"""Special tokens that configs name: each is a token of the base, or the base is refused before it is built."""

import json
import shutil

import pytest
from transformers import GPT2Config

from edgeprompt.base.geometry import tokens_of
from edgeprompt.errors import PackageError, SourceError
from edgeprompt.package.manifest import Manifest
from exporters import export_model

SIZE = 512
_ONE = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"}
_FIELDS = [
    *((name, SIZE) for name in sorted(_ONE)),
    ("eos_token_id", [0, SIZE + 3]),
    ("forced_eos_token_id", SIZE),
    ("suppress_tokens", [3, SIZE]),
    ("begin_suppress_tokens", [SIZE]),
    ("bad_words_ids", [[3], [4, SIZE]]),
]


@pytest.fixture
def base_of(tiny_llama_base, tiny_gpt2_base, seq2seq_base, encoder_base):
    def find(kind):
        made = {"Llama": tiny_llama_base, "GPT-2": tiny_gpt2_base}
        return made.get(kind) or (encoder_base if kind in ("BERT", "ModernBERT") else seq2seq_base)(kind)

    return find


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "T5", "BART", "BERT", "ModernBERT"])
def test_a_token_beyond_the_vocabulary_is_refused_at_export(kind, file, base_of, tmp_path):
    whole = base_of(kind)
    if file.startswith("generation") and kind in ("BERT", "ModernBERT"):
        pytest.skip("encoders have none")
    for number, (name, value) in enumerate(_FIELDS):
        if kind in ("BERT", "ModernBERT") and name not in ("bos_token_id", "eos_token_id", "pad_token_id"):
            continue  # encoders' configs have no others
        base = shutil.copytree(whole, tmp_path / str(number))
        if file == "config.json":
            (base / "generation_config.json").unlink(missing_ok=True)
        path = base / file
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), name: value}))
        out = tmp_path / "out"
        with pytest.raises(SourceError, match=rf"{name}.*{SIZE}|makes no model: Padding_idx") as told:
            export_model(base, out)
        assert "\n" not in str(told.value)
        assert not out.exists()


def test_a_default_of_the_class_is_no_token_and_told(caplog):
    """A config that does not say one has its class's: GPT-2's 50256, in a vocabulary of another size."""
    with caplog.at_level("WARNING", "edgeprompt"):
        found = tokens_of(GPT2Config(vocab_size=21128))
    assert (found.bos, found.eos) == (None, ())
    assert "eos_token_id=50256 is no token of this base" in caplog.text
    with pytest.raises(SourceError, match="says eos_token_id 30000"):
        tokens_of(GPT2Config(vocab_size=21128, eos_token_id=30000))


def test_a_padding_token_of_minus_one_is_none():
    config = GPT2Config(vocab_size=512, bos_token_id=0, eos_token_id=0)
    config.pad_token_id = -1
    assert tokens_of(config).pad is None
    config.eos_token_id = -1
    with pytest.raises(SourceError, match="says eos_token_id -1"):
        tokens_of(config)


@pytest.mark.parametrize(
    ("kind", "name"), [("T5", "pad"), ("T5", "decoder_start"), ("BART", "forced_bos"), ("BERT", "pad")]
)
def test_a_package_of_older_times_that_feeds_such_a_token_is_refused(kind, name, seq2seq_package, encoder_package):
    package = encoder_package(kind) if kind == "BERT" else seq2seq_package(kind)
    written = json.loads((package / "edgeprompt.json").read_text())
    written["tokens"][name] = SIZE
    with pytest.raises(PackageError, match=rf"tokens\.{name} is {SIZE}"):
        Manifest.from_json(json.dumps(written))
