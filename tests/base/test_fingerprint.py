"""The base fingerprint: the same however a base is loaded, another for other weights, old ones still compared."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from edgeprompt.base.fingerprint import base_fingerprint, fingerprint_of, sampled_rows
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import load_base
from edgeprompt.package.manifest import Base
from tests.support.damaged import bases

CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
KINDS = ["llama", "qwen2", "gpt2", "bert", "t5", "bart"]
MATRICES = {  # one of every kind that a LoRA is merged into
    "llama": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "lm_head"],
    "qwen2": ["self_attn.q_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "mlp.c_proj"],
    "bert": ["attention.self.query", "intermediate.dense"],
    "t5": ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wo", "lm_head"],
    "bart": ["encoder_attn.q_proj", "fc2"],
}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{**CONFIG, "intermediate_size": 96, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def old_format(model):
    geometry = geometry_of(model.config)
    sample = model.get_input_embeddings().weight.detach()[sampled_rows(geometry.vocab_size)].float().numpy()
    return Base("old", fingerprint_of(model.config.model_type, geometry, sample))


def merge_lora(model, module, size, rank=8):
    """What merging an adapter does: a product of rank 8, its largest entry `size` of the weight's deviation."""
    name, weight = next((name, p) for name, p in model.named_parameters() if name.endswith(f"{module}.weight"))
    delta = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
    with torch.no_grad():
        weight += delta * (size * weight.std() / delta.abs().max())
    return name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_precision_does_not_matter(kind, dtype, tmp_path):
    base = load_base(bases.save(tmp_path / "base", kind))
    assert base.fingerprint.startswith("sha256-2:")
    half = copy.deepcopy(base.model).to(dtype)
    assert base_fingerprint(half) == base.fingerprint
    half.save_pretrained(tmp_path / "half")
    assert load_base(tmp_path / "half").fingerprint == base.fingerprint
    half.half().save_pretrained(tmp_path / "twice")
    assert load_base(tmp_path / "twice").fingerprint == base.fingerprint


@pytest.mark.parametrize(("kind", "module"), [(kind, module) for kind in KINDS for module in MATRICES[kind]])
def test_a_merged_adapter_has_another(kind, module, tmp_path):
    torch.manual_seed(0)
    base = load_base(bases.save(tmp_path, kind))
    before = base.base
    merge_lora(base.model, module, 0.5)  # the fewer values a matrix has, the larger a change must be
    after = base.base
    assert after.fingerprint != before.fingerprint
    assert not after.matches(before)
    assert "fine-tuned or merged" in after.apart(before)
    assert after.matches(old_format(base.model)), "an old fingerprint does not notice"
    assert "would not be noticed" in after.weaker(old_format(base.model))


@pytest.mark.parametrize("name", ["attn.c_attn.bias", "ln_1.bias"])
def test_biases_count(name, tmp_path):
    base = load_base(bases.save(tmp_path, "gpt2"))
    before = base.fingerprint
    with torch.no_grad():
        next(p for n, p in base.model.named_parameters() if n.endswith(name)).sub_(0.1)
    assert base.fingerprint != before


def test_layers_that_change_places_count():
    model = make()
    before = base_fingerprint(model)
    model.model.layers = model.model.layers[::-1]
    assert base_fingerprint(model) != before


def test_other_names_do_not_count():
    model = make()
    before = base_fingerprint(model)
    for layer in model.model.layers:
        layer.mlp.up = layer.mlp.up_proj
        del layer.mlp.up_proj
    assert base_fingerprint(model) == before


def test_a_tied_head_and_padding_do_not_matter(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert base_fingerprint(AutoModel.from_pretrained(tmp_path)) == base_fingerprint(model)
    before = base_fingerprint(model)
    table = model.model.embed_tokens
    table.weight = torch.nn.Parameter(torch.cat([table.weight, torch.randn(12, 64)]))
    model.tie_weights()
    assert base_fingerprint(model) == before


@pytest.mark.parametrize("changes", [{"seed": 1}, {"vocab_size": 501}, {"num_hidden_layers": 3}])
def test_another_base_has_another(changes):
    assert base_fingerprint(make(**changes)) != base_fingerprint(make())


def test_old_fingerprints_are_compared_by_what_they_cover():
    model, other = make(), make(seed=1)
    new = Base("new", base_fingerprint(model))
    assert new.matches(old_format(model))
    assert old_format(model).matches(new)
    assert not new.matches(old_format(other))
    assert not old_format(other).matches(old_format(model))
    assert new.weaker(new) is None


@pytest.mark.slow
def test_a_gguf_file_and_its_saves_agree(smollm2_gguf, tmp_path):
    """Real weights: Q4_1, read as float32, saved in every type; then a small adapter merged into one layer."""
    base = load_base(smollm2_gguf)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        copy.deepcopy(base.model).to(dtype).save_pretrained(tmp_path / str(dtype))
        assert load_base(tmp_path / str(dtype)).fingerprint == base.fingerprint
    before = base.fingerprint
    torch.manual_seed(0)
    merge_lora(base.model, "layers.17.self_attn.v_proj", 0.01)
    assert base.fingerprint != before
