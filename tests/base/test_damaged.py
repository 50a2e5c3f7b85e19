"""No damaged base loads in silence: it is refused with one clear line, or loads with a note and the right weights."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from edgeprompt.base.gguf_file import GgufFile
from edgeprompt.base.load import load_base
from edgeprompt.errors import SourceError
from tests.support.damaged import bases
from tests.support.gguf_models import write_gguf

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_FIELDS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
}  # fmt: skip

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


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 4.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_buffers_of_older_checkpoints_pass(rope, dtype, tmp_path, caplog):
    """As transformers stored them once: frequencies without scaling, masks, positions."""
    theta = {"rope_theta": 500000.0, **rope}
    path = bases.config(rope_parameters={"rope_type": "default", **theta})(tmp_path)
    held = load_file(path / bases.WEIGHTS)
    for layer in (0, 1):
        held[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (500000.0 ** (-torch.arange(4) / 4)).to(dtype)
        held[f"model.layers.{layer}.self_attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        held[f"model.layers.{layer}.self_attn.masked_bias"] = torch.tensor(-1e4, dtype=dtype)
    held["model.position_ids"] = torch.arange(64)[None]
    save_file(held, path / bases.WEIGHTS, metadata={"format": "pt"})
    assert load_base(path).config.rope_parameters["rope_theta"] == 500000.0
    assert not caplog.text


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


@pytest.mark.parametrize(("pre", "pieces"), [("gpt-2", ["a", "Ċ", "Ċ", "12"]), ("smollm", ["a", "ĊĊ", "1", "2"])])
def test_a_gguf_files_own_rule_cuts_text(pre, pieces, tmp_path):
    backend = load_base(bases.gguf(pre=pre)(tmp_path)).tokenizer.backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a\n\n12")] == pieces


@pytest.mark.parametrize("wrong", [{"tokenizer": None}, {"pre": "deepseek-llm"}])
def test_a_tokenizer_beside_a_gguf_file_is_taken(wrong, tmp_path, caplog):
    path = bases.gguf(**wrong)(tmp_path)
    bases.tokenizer().save(str(tmp_path / "tokenizer.json"))
    loaded = load_base(path)
    assert loaded.tokenizer.encode("a")
    assert "beside it is used" in caplog.text


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear"),
        ({"rope.scaling.factor": 4.0}, "linear"),
        ({"rope.scale_linear": 4.0}, "linear"),
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


@pytest.mark.parametrize(
    ("kind", "values", "fields"),
    [
        ("phi3", {"sliding_window": 8}, {}),
        ("phi3", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, {}),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "rope_local_base_freq": 500.0}, {"rope.freq_base_swa": 500.0}),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, YARN_FIELDS | {"rope.scaling.yarn_beta_fast": 16.0}),
    ],
)
def test_what_a_gguf_file_says_of_the_computation_is_kept(kind, values, fields, tmp_path):
    """transformers passes over these keys of the file, and would answer with the defaults of the config's class."""
    sizes = {"vocab_size": 400, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    more = {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6} if kind == "gemma3_text" else {}
    shape = {**sizes, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**shape, **more, **values})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    if kind == "phi3":  # its class wants a padding token of its own that no file tells
        model.resize_token_embeddings(32064)
    path = write_gguf(model, tmp_path / "tiny.gguf", tokenizer=bases.tokenizer(), fields=fields)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        difference = load_base(path).model(input_ids=ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() < 1e-5


def test_the_largest_gemma_3_scales_its_attention_otherwise(tmp_path):
    """62 layers are the 27B's, as llama.cpp tells it: its scale is of the width, not of the head."""
    sizes = {"num_hidden_layers": 62, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("gemma3_text", **sizes)
    GgufFile((bases.gguf()(tmp_path),)).keep_fields(config)
    assert config.query_pre_attn_scalar == 32


def test_a_trainers_file_is_read(tmp_path):
    loaded = load_base(bases.pickled(lambda held: {"state_dict": held, "epoch": 3})(tmp_path))
    want, got = bases.model("llama").state_dict(), loaded.model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_every_kind_of_damage_is_there():
    assert len(bases.CASES) >= 80
