"""No damaged base loads in silence: it is refused with one clear line, or loads with a note and the right weights."""

import logging
import re

import pytest
import torch

from edgeprompt.base.load import load_base
from edgeprompt.errors import SourceError
from tests.support.damaged import bases

KINDS = {"gpt2": "GPT-2", "bert": "BERT|encoder's", "t5": "T5", "bart": "BART"}


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "llama")


@pytest.mark.parametrize("name", bases.CASES)
def test_no_damage_is_silent(name, tmp_path, caplog):
    case = bases.CASES[name]
    path = case.make(tmp_path)
    if case.loads:
        with caplog.at_level(logging.WARNING, "edgeprompt"):
            loaded = load_base(path)
        assert re.search(case.says, caplog.text), caplog.text
        if "zero" not in name:
            want = bases.model(kind_of(name)).state_dict()
            if "head deleted" in name:
                want = {n.removeprefix("bert."): t for n, t in want.items() if n.startswith("bert.")}
            got = loaded.model.state_dict()
            assert {n: t.shape for n, t in got.items() if n in want} == {n: t.shape for n, t in want.items()}
            assert all(torch.equal(got[n], t) for n, t in want.items())
        return
    with pytest.raises(SourceError, match=case.says) as caught:
        load_base(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert", "t5", "bart"])
def test_a_whole_one_loads_without_a_word(kind, tmp_path, caplog, capfd):
    bases.save(tmp_path, kind)
    loaded = load_base(tmp_path)
    want, got = bases.model(kind).state_dict(), loaded.model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert not caplog.text
    assert not capfd.readouterr().err.replace("\r", "").strip()


@pytest.mark.parametrize("parts", [1, 3])
def test_gguf_whole_or_in_parts(parts, tmp_path, caplog):
    path = (bases.gguf() if parts == 1 else bases.split(1, 0, 2))(tmp_path)
    loaded = load_base(path)
    want, got = bases.model("llama").state_dict(), loaded.model.state_dict()
    assert all(torch.allclose(got[name], tensor, atol=1e-7) for name, tensor in want.items())
    assert loaded.name == "tiny"
    assert loaded.tokenizer.encode("a")
    assert not caplog.text


def test_a_gguf_files_own_tokenizer_counts(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert load_base(bases.gguf()(tmp_path)).tokenizer.encode("th") == [258]


def test_a_tokenizer_beside_a_gguf_file_is_taken(tmp_path, caplog):
    path = bases.gguf(tokenizer=None)(tmp_path)
    bases.tokenizer().save(str(tmp_path / "tokenizer.json"))
    loaded = load_base(path)
    assert loaded.tokenizer.encode("a")
    assert "beside it is used" in caplog.text


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            "yarn",
        ),
    ],
)
def test_rope_scaling_of_a_gguf_file_is_kept(fields, kind, tmp_path):
    config = load_base(bases.gguf(fields=fields)(tmp_path)).config
    assert config.rope_parameters["rope_type"] == kind
    assert config.rope_parameters["factor"] == 4.0


def test_the_rotary_factors_of_llama_3_are_kept(tmp_path):
    import numpy as np
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, head = 500000.0, 8
    rope = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": theta,
    }  # fmt: skip
    like = LlamaConfig(head_dim=head, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](like, "cpu")
    factors = (theta ** (-np.arange(0, head, 2) / head) / scaled.numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(32)
    config = load_base(
        bases.gguf(extra={"rope_freqs.weight": factors}, fields={"rope.freq_base": theta, "context_length": 131072})(
            tmp_path
        )
    ).config
    assert config.rope_parameters == rope


def test_a_trainers_file_is_read(tmp_path):
    loaded = load_base(bases.pickled(lambda held: {"state_dict": held, "epoch": 3})(tmp_path))
    want, got = bases.model("llama").state_dict(), loaded.model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_every_kind_of_damage_is_there():
    assert len(bases.CASES) >= 80
