"""What a base's generation_config says goes into the manifest, and what is not carried out is told."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, LlamaConfig

from edgeprompt import names
from edgeprompt.base.generation import _HARMLESS, _SAMPLING, _UNSUPPORTED, generation_of
from edgeprompt.base.load import load_base
from edgeprompt.errors import PackageError, SourceError
from edgeprompt.package.folder import open_package
from edgeprompt.package.generation import FIELDS, check_generation
from edgeprompt.package.manifest import Manifest
from exporters import export_model

SAID = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "min_length": 4,
    "min_new_tokens": 2,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 0,
    "suppress_tokens": [7, 8],
    "begin_suppress_tokens": [9],
    "bad_words_ids": [[3, 4], [6]],
}
CARRIED = {**SAID, "forced_eos_token_id": [0]}


def test_every_field_is_carried(tiny_llama_base, tmp_path):
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    GenerationConfig(eos_token_id=[0, 2], **SAID).save_pretrained(base)
    package = export_model(base, tmp_path / "package").path
    manifest = open_package(package).manifest
    assert set(CARRIED) == set(FIELDS)
    assert dict(manifest.generation) == CARRIED
    assert manifest.tokens.eos == (0, 2)
    assert "generation_notes" not in manifest.extra


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "T5", "BART"])
def test_fields_in_an_older_config_are_carried_where_there_is_no_other(
    kind, tiny_llama_base, tiny_gpt2_base, seq2seq_base, tmp_path
):
    """transformers reads them from config.json then, and its config class drops them: so did the export."""
    given = {"Llama": tiny_llama_base, "GPT-2": tiny_gpt2_base}.get(kind) or seq2seq_base(kind)
    base = shutil.copytree(given, tmp_path / "base")
    file, own = base / "config.json", base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **SAID}))

    def carried():
        loaded = load_base(base)
        return generation_of(loaded.config, loaded.model.generation_config, loaded.family.architecture)[0]

    assert carried().get("no_repeat_ngram_size") is None, "transformers asks generation_config.json alone where it is"
    own.unlink()
    model = (AutoModelForSeq2SeqLM if kind in ("T5", "BART") else AutoModelForCausalLM).from_pretrained(base)
    assert {name: getattr(model.generation_config, name) for name in SAID} == SAID
    assert carried() == CARRIED


def test_what_changes_nothing_is_left_out():
    neutral = GenerationConfig(repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0, num_beams=1)
    assert generation_of(LlamaConfig(), neutral, names.DECODER_ONLY) == ({}, [])
    assert generation_of(LlamaConfig(), None, names.DECODER_ONLY) == ({}, [])
    assert generation_of(LlamaConfig(), GenerationConfig(**SAID), names.ENCODER_ONLY) == ({}, [])


def test_what_is_not_carried_out_is_told():
    config = GenerationConfig(num_beams=4, penalty_alpha=0.6, guidance_scale=1.5, do_sample=True, temperature=0.7)
    _, notes = generation_of(LlamaConfig(), config, names.ENCODER_DECODER)
    for told in ("num_beams=4", "--num-beams 4", "penalty_alpha=0.6", "guidance_scale=1.5", "temperature=0.7"):
        assert any(told in note for note in notes), notes
    assert len(notes) == 4
    _, notes = generation_of(LlamaConfig(), config, names.DECODER_ONLY)
    assert any("decoders here answer without beams" in note for note in notes)


@pytest.mark.parametrize(
    "field",
    [
        {"suppress_tokens": ["a"]}, {"forced_bos_token_id": 32000}, {"forced_eos_token_id": [2, 40000]},
        {"repetition_penalty": float("nan")}, {"repetition_penalty": float("inf")}, {"min_length": -3},
        {"bad_words_ids": 5}, {"bad_words_ids": [5]}, {"suppress_tokens": 1.5}, {"forced_eos_token_id": {"a": 1}},
    ],
)  # fmt: skip
def test_nonsense_is_refused(field):
    config = GenerationConfig()
    for name, value in field.items():
        setattr(config, name, value)  # as a file has it: transformers checks only what its constructor is given
    with pytest.raises(SourceError, match="generation_config is not usable"):
        generation_of(LlamaConfig(vocab_size=32000), config, names.DECODER_ONLY)


def test_every_field_of_transformers_is_known_and_a_new_one_is_told():
    everything = GenerationConfig()
    for name in vars(everything):
        if not name.startswith("_") and name != "transformers_version":
            assert name in (*FIELDS, *_HARMLESS, *_SAMPLING, *_UNSUPPORTED), name
    _, notes = generation_of(LlamaConfig(), GenerationConfig(entropy_floor=0.5), names.DECODER_ONLY)
    assert notes == ["entropy_floor=0.5 is not carried out: answers may differ from model.generate"]


@pytest.mark.parametrize("name", _UNSUPPORTED)
def test_each_field_that_is_not_carried_out_is_told(name):
    config = GenerationConfig()
    setattr(config, name, 2)
    _, notes = generation_of(LlamaConfig(), config, names.DECODER_ONLY)
    assert notes == [f"{name}=2 is not carried out: answers may differ from model.generate"]


@pytest.mark.parametrize(
    "bad",
    [
        {"repetition_penalty": 0}, {"repetition_penalty": "1"}, {"min_length": -1}, {"min_length": True},
        {"bad_words_ids": [[]]}, {"bad_words_ids": [3]}, {"suppress_tokens": [-1]}, {"unknown": 1}, [],
    ],
)  # fmt: skip
def test_the_reader_is_strict(bad, tiny_llama_package):
    with pytest.raises(ValueError, match="generation"):
        check_generation(bad)
    written = json.loads((tiny_llama_package / "edgeprompt.json").read_text())
    with pytest.raises(PackageError, match="generation"):
        Manifest.from_json(json.dumps({**written, "generation": bad}))
    written.pop("generation", None)  # as it was before
    assert Manifest.from_json(json.dumps(written)).generation == {}


def test_beam_search_of_a_base_is_carried_where_there_are_beams():
    config = GenerationConfig(num_beams=4, length_penalty=2.0, early_stopping=True)
    carried, _ = generation_of(LlamaConfig(), config, names.ENCODER_DECODER)
    assert carried == {"length_penalty": 2.0, "early_stopping": True} == check_generation(carried)
    assert generation_of(LlamaConfig(), config, names.DECODER_ONLY)[0] == {}
    for wrong in ({"length_penalty": float("inf")}, {"length_penalty": "x"}, {"early_stopping": "soon"}):
        with pytest.raises(ValueError, match="generation"):
            check_generation(wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"forced_bos_token_id": 3, "suppress_tokens": [3]},
        {"forced_eos_token_id": [3], "suppress_tokens": [3]},
        {"forced_eos_token_id": [3, 4], "suppress_tokens": [4, 3]},
    ],
)
def test_a_token_that_must_come_and_may_not_is_refused(fields):
    """They used to end in an answer's NaN."""
    with pytest.raises(ValueError, match=r"forces token 3, which (\w+) forbids.*remove it from one of them"):
        check_generation(fields)
    config = GenerationConfig()
    for name, value in fields.items():  # transformers refuses some of them in its constructor
        setattr(config, name, value)
    with pytest.raises(SourceError, match=r"generation_config is not usable: .* forces token 3"):
        generation_of(LlamaConfig(vocab_size=9), config, names.ENCODER_DECODER)


def test_export_says_which_fields_contradict(seq2seq_base, tmp_path):
    base = shutil.copytree(seq2seq_base("BART"), tmp_path / "base")
    file = base / "generation_config.json"
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**fields, "forced_bos_token_id": 5, "suppress_tokens": [5]}))
    with pytest.raises(SourceError, match=r"forced_bos_token_id.*suppress_tokens"):
        export_model(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_forced_token_that_may_come_is_kept():
    for fields in (
        {"forced_eos_token_id": [3, 4], "suppress_tokens": [3], "begin_suppress_tokens": [4]},
        {"forced_bos_token_id": 3, "bad_words_ids": [[3, 4]], "suppress_tokens": [5]},
        {"forced_bos_token_id": 3, "bad_words_ids": [[3]], "begin_suppress_tokens": [3]},
    ):
        assert check_generation(fields) == fields
