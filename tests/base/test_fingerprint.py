"""The base fingerprint: the same however a base is loaded, another for other weights, old ones still compared."""

import base64
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from edgeprompt.base.fingerprint import Digest, base_fingerprint, config_facts, fingerprint_of, sampled_rows
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import load_base
from edgeprompt.package.fingerprint import FORMAT_3, SWITCHED_OFF, brief, differences, parse, rank
from edgeprompt.package.manifest import Base
from tests.support import base_changes, seq2seq_models
from tests.support.damaged import bases
from tests.support.decoder_models import _SIZES, CONFIGS
from tests.support.gguf_models import write_gguf

CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
KINDS = base_changes.KINDS
FORMAT_2 = {  # written by the version before format 3
    "llama": "sha256-2:2a3a2a731d9d06b7eda9cbcdc0d19522dee9d129a85b9e504a38612eda512f38.29e844f445a23495",
    "qwen2": "sha256-2:c7e8159f796dcb6b60bf5bc83d5c9e316e52604d2f6b822c3ec7793ae82d5608.5dcb4b45e5b44940",
    "gpt2": "sha256-2:e13db9a4ba073e97823ec5206a2febb307ec00058bf165b1409dc5ae1c7318d7.7dbcc0c851bb6b53",
    "bert": "sha256-2:9ab0b7a1e2f2bb442354f87ea848af6e65e28f5d08123e10e1ebda9ca47684a4.f0f43b417715d6c1",
    "t5": "sha256-2:233b32d4e1923583e3a071338453945a64c877a013180100bcdcf4cb3799a677.f4eb8e4c24787acb",
    "bart": "sha256-2:fe825b1ec04eee5cd71be4bed64b22c7b93ae6a57fe9618eb9b72f54aaeaa498.2eba2053fa2bd484",
}
ENTRY = (2, 33777, [-14, -343, 6477, 1358])
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


def entry_of(digest):
    return int(digest.entry["kind"]), int(digest.entry["norm"]), [int(one) for one in digest.entry["sums"]]


def merge_lora(model, module, size, rank=8):
    """What merging an adapter does: a product of rank 8, its largest entry `size` of the weight's deviation."""
    name, weight = next((name, p) for name, p in model.named_parameters() if name.endswith(f"{module}.weight"))
    delta = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
    with torch.no_grad():
        weight += delta * (size * weight.std() / delta.abs().max())
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_types_and_what_they_were_before_do_not_matter(kind, tmp_path):
    base = load_base(bases.save(tmp_path / "base", kind))
    assert rank(base.fingerprint) == (3, True)
    for number, steps in enumerate((("half",), ("bfloat16",), ("half", "bfloat16"), ("bfloat16", "half"))):
        other = copy.deepcopy(base.model)
        for step in steps:
            other = getattr(other, step)()
        other.save_pretrained(tmp_path / str(number))
        saved = load_base(tmp_path / str(number)).base
        assert saved.matches(base.base), steps
        assert saved.weaker(base.base) is None
        assert base.base.matches(Base("in memory", base_fingerprint(other)))


@pytest.mark.parametrize(("what", "kind"), base_changes.CASES)
def test_another_base_is_noticed(what, kind):
    """Before format 3, IA3, norms, scaled layers, swapped matrices and configs were not noticed."""
    plain = bases.model(kind)
    other = base_changes.changed(plain, what, kind)
    known, found = Base("known", base_fingerprint(plain)), Base("found", base_fingerprint(other))
    assert not known.matches(found)
    assert not found.matches(known)
    assert known.apart(found) or what == "heads"
    half = Base("half", base_fingerprint(copy.deepcopy(other).bfloat16()))
    assert not half.matches(known), "a conversion hides it"
    assert half.matches(found)
    assert Base("both", base_fingerprint(copy.deepcopy(plain).bfloat16())).matches(known)
    assert not half.matches(Base("both", base_fingerprint(copy.deepcopy(plain).bfloat16())))


@pytest.mark.parametrize("kind", KINDS)
def test_format_2_is_still_read(kind):
    known, old = Base("new", base_fingerprint(bases.model(kind))), Base("old", FORMAT_2[kind])
    assert known.matches(old)
    assert old.matches(known)
    assert "base 'old' is of format 2" in known.weaker(old)
    norms = Base("norms", base_fingerprint(base_changes.changed(bases.model(kind), "trained norms", kind)))
    assert norms.matches(old), "an old fingerprint does not notice"
    merged = Base("merged", base_fingerprint(base_changes.changed(bases.model(kind), "merged LoRA", kind)))
    assert not merged.matches(old)


def test_a_gguf_file_has_the_fingerprint_of_its_folder(tmp_path):
    folder = load_base(bases.save(tmp_path, "llama"))
    file = load_base(write_gguf(bases.model("llama"), tmp_path / "model.gguf", tokenizer=bases.tokenizer()))
    assert file.base.matches(folder.base)
    assert file.base.weaker(folder.base) is None


FAMILIES = {
    "llama": {"rope_theta": 500000.0, "num_key_value_heads": 2, "intermediate_size": 64},
    "qwen2": {"rms_norm_eps": 1e-5, "num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 2, "intermediate_size": 64},
    "gemma3_text": {"sliding_window": 16, "num_key_value_heads": 2, "intermediate_size": 64, "num_hidden_layers": 6,
                    "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"layer_norm_epsilon": 1e-6},
    "t5": {"d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2,
           "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
UNKNOWN = {  # what no GGUF file says, or what transformers does not read in it
    "qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_window"),
    "llama": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}}, "rope_type"),
    "gemma3_text": ({"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
    "gpt2": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
}
TOLD = {
    "qwen2": {"rms_norm_eps": 1e-4},
    "llama": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    "gemma3_text": {"sliding_window": 32},
    "gpt2": {"layer_norm_epsilon": 1e-4},
    "t5": {"relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-4},
}


def folder_and_file(kind, folder, **changes):
    """A base as a folder and as a GGUF file of the same floats."""
    from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259, "eos_token_id": 0}
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    padding = {"pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 1}
    model = auto.from_config(AutoConfig.for_model(kind, **{**sizes, **padding, **FAMILIES[kind], **changes})).float()
    if kind == "t5":
        model.config.tie_word_embeddings = model.config.scale_decoder_outputs = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(259, 32))
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01 * torch.randn_like(value)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bases.tokenizer(), eos_token="<eos>").save_pretrained(folder)
    file = write_gguf(model, folder / "model.gguf", tokenizer=bases.tokenizer())
    return load_base(folder), load_base(file)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_gguf_file_is_the_base_that_it_was_made_of(kind, tmp_path):
    folder, file = folder_and_file(kind, tmp_path)
    ids = torch.arange(5, 25)[None]
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    torch.testing.assert_close(file.model(ids, **more).logits, folder.model(ids, **more).logits, rtol=0, atol=1e-4)
    assert not file.base.apart(folder.base)
    assert file.base.matches(folder.base)
    assert file.base.weaker(folder.base) is None


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_a_gguf_file_does_not_tell_is_a_note(kind, tmp_path):
    changes, name = UNKNOWN[kind]
    folder, file = folder_and_file(kind, tmp_path, **changes)
    assert folder.base.matches(file.base)
    assert file.base.matches(folder.base)
    for note in (folder.base.weaker(file.base), file.base.weaker(folder.base)):
        assert "'model' is of a GGUF file that does not tell" in note
        assert name in note
    twin = load_base(write_gguf(folder.model, tmp_path / "twin.gguf", tokenizer=bases.tokenizer())).base
    assert twin.weaker(file.base) is None


@pytest.mark.parametrize("kind", TOLD)
def test_what_both_files_tell_must_agree(kind, tmp_path):
    file = folder_and_file(kind, tmp_path / "one")[1]
    other = folder_and_file(kind, tmp_path / "two", **TOLD[kind])
    for base in other:
        assert not base.base.matches(file.base)
        assert "their configs differ" in base.base.apart(file.base)


def test_what_a_file_says_besides_does_not_count(tmp_path):
    config = AutoConfig.for_model("llama", **CONFIG)
    before = config_facts(config)
    for name, value in {"pad_token_id": 3, "use_cache": False, "unsloth_fixed": True, "attention_dropout": 0.1}.items():
        setattr(config, name, value)
    assert config_facts(config) == before
    config.rms_norm_eps = 9.999999747378752e-06  # 1e-5 in float32, as GGUF has it
    assert config_facts(config)["rms_norm_eps"] == 1e-5


def test_the_sums_are_the_same_for_ever():
    digest = Digest(torch.arange(-24, 24, dtype=torch.float32).reshape(6, 8) / 7)
    assert entry_of(digest) == ENTRY
    assert entry_of(Digest(torch.zeros(4))) == (0, 0, [0, 0, 0, 0])


def test_a_broken_fingerprint_is_compared_as_a_whole():
    whole = base_fingerprint(bases.model("t5"))
    for broken in (whole[:-3], whole + ".x", whole.replace(".e", ".%"), "sha256-3:", whole + "\ud800"):
        assert not Base("a", broken).matches(Base("b", whole))
        assert Base("a", broken).matches(Base("b", broken))
    assert len(brief(whole)) < 40 < len(whole)


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
    assert "base 'old' is of format 1" in after.weaker(old_format(base.model))


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


def test_other_names_are_told():
    model = make()
    before = Base("before", base_fingerprint(model))
    for layer in model.model.layers:
        layer.mlp.up = layer.mlp.up_proj
        del layer.mlp.up_proj
    after = Base("after", base_fingerprint(model))
    assert after.matches(before)
    assert "other names" in after.weaker(before)


def test_a_tied_head_and_padding_do_not_matter(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert base_fingerprint(AutoModel.from_pretrained(tmp_path)) == base_fingerprint(model)
    before = base_fingerprint(model)
    table = model.model.embed_tokens
    table.weight = torch.nn.Parameter(torch.cat([table.weight, torch.randn(12, 64)]))
    model.tie_weights()
    assert base_fingerprint(model) == before


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DistilBERT", "ELECTRA, small", "ALBERT", "ModernBERT"])
def test_a_masked_head_that_was_trained_is_another_base(family, encoder_base):
    """Prompts with a mask answer through it; a base without it is the same."""
    base = load_base(encoder_base(family))
    bare = Base("bare", base_fingerprint(base.model.base_model))
    before = base.base
    assert before.matches(bare)
    assert bare.matches(before)
    assert Base("half", base_fingerprint(copy.deepcopy(base.model).half())).matches(before)
    inside = {id(value) for value in base.model.base_model.parameters()}
    with torch.no_grad():
        for value in base.model.parameters():
            if id(value) not in inside and value.dim() == 2:
                value += 0.1 * value.std() * torch.randn_like(value)
            elif id(value) not in inside:
                value += 0.1 * torch.randn_like(value)
    assert not Base("after", base_fingerprint(base.model)).matches(before)


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DistilBERT", "ELECTRA, small", "ALBERT", "ModernBERT"])
def test_a_masked_head_that_was_scaled_is_another_base(family, encoder_base):
    """Its signs are the same, which were all that counted."""
    model = load_base(encoder_base(family)).model
    before = Base("before", base_fingerprint(model))
    for kind in (torch.float16, torch.bfloat16):
        assert Base("rounded", base_fingerprint(copy.deepcopy(model).to(kind))).matches(before)
    read = parse(before.fingerprint)
    assert set(read.facts) >= {"masked_head", "masked_head_sizes"}
    old = {name: value for name, value in read.facts.items() if name != "masked_head_sizes"}
    inside = {id(value) for value in model.base_model.parameters()}
    for value in model.parameters():
        if id(value) in inside or not value.any():
            continue
        with torch.no_grad():
            value *= 1.5
            other = Base("scaled", base_fingerprint(model))
            value /= 1.5
        assert not other.matches(before)
        assert "masked_head_sizes" in other.apart(before)
        # As it was before sizes were noted: the signs are compared.
        assert other.matches(Base("old", _with_facts(before.fingerprint, old)))


def _with_facts(fingerprint, facts):
    signs, first, _, sketch = fingerprint.removeprefix(FORMAT_3).split(".")
    text = base64.urlsafe_b64encode(json.dumps(facts).encode()).decode().rstrip("=")
    return f"{FORMAT_3}{signs}.{first}.{text}.{sketch}"


@pytest.mark.parametrize("wrong", ["", "!", "AAAA", 3, True])
def test_sizes_of_a_head_that_are_none_are_other_sizes(wrong, encoder_base):
    one = base_fingerprint(load_base(encoder_base("BERT")).model)
    other = _with_facts(one, {**parse(one).facts, "masked_head_sizes": wrong})
    assert differences(one, other)
    assert differences(other, one)


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
        saved = load_base(tmp_path / str(dtype)).base
        assert saved.matches(base.base)
        assert saved.weaker(base.base) is None
    before = base.fingerprint
    torch.manual_seed(0)
    merge_lora(base.model, "layers.17.self_attn.v_proj", 0.01)
    assert base.fingerprint != before


def test_the_counts_in_the_docs():
    text = (Path(__file__).resolve().parents[2] / "docs/robustness.md").read_text("utf-8").split("## Other bases")[1]
    rows = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")]
    counts = [int(one) for one in rows if one.isdigit()]
    assert sum(counts) == len(base_changes.CASES)
    assert f"{len(KINDS) * 4 + 1} cases" in text


@pytest.mark.parametrize("kind", ["pegasus", "marian"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_changed_table_of_sinusoids_is_another_base(kind, side, tmp_path):
    """It was taken for computed whatever the file held; a file without it, or with it in bfloat16, is the same base."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 300,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
             "pad_token_id": 1, "eos_token_id": 0, "decoder_vocab_size": 300, "decoder_start_token_id": 1}  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(tmp_path)
    plain, file = load_base(tmp_path).base, tmp_path / "model.safetensors"
    held = {name: value for name, value in load_file(file).items() if "embed_positions" not in name}
    tables = {
        f"model.{one}.embed_positions.weight": getattr(model.model, one).embed_positions.weight.detach().clone()
        for one in ("encoder", "decoder")
    }
    half = {name: table.bfloat16() for name, table in tables.items()}
    for given in (half, {}) if kind == "marian" else (half,):  # transformers wants them in a file of Pegasus
        save_file({**held, **given}, file, metadata={"format": "pt"})
        assert load_base(tmp_path).base.matches(plain)
    tables[f"model.{side}.embed_positions.weight"][3:6] *= 1.1
    save_file({**held, **tables}, file, metadata={"format": "pt"})
    changed = load_base(tmp_path)
    loaded = getattr(changed.model.model, side).embed_positions.weight
    assert torch.equal(loaded, tables[f"model.{side}.embed_positions.weight"]), "the file's table is what computes"
    assert not changed.base.matches(plain)


def test_a_bias_of_all_logits_is_part_of_a_base():
    """BART's and Marian's are added to every answer, and were left out; zeros are as none."""
    plain, one, other = (copy.deepcopy(bases.model("bart")) for _ in range(3))
    known = Base("known", base_fingerprint(plain))
    torch.manual_seed(0)
    one.final_logits_bias.normal_()
    other.final_logits_bias.copy_(one.final_logits_bias * 1.05)
    first, second = (Base("found", base_fingerprint(model)) for model in (one, other))
    assert not first.matches(second)
    assert first.matches(Base("half", base_fingerprint(copy.deepcopy(one).bfloat16())))
    zero = copy.deepcopy(one)
    zero.final_logits_bias.zero_()
    without = Base("zero", base_fingerprint(zero))
    assert "final_logits_bias" in first.apart(without)
    assert not first.matches(without)
    assert not without.matches(first)
    # A fingerprint of before does not say whether there is one: as ever, a note.
    facts = {name: value for name, value in parse(without.fingerprint).facts.items() if name != "final_logits_bias"}
    old = Base("old", _with_facts(without.fingerprint, facts))
    assert old.matches(without)
    assert old.matches(first)
    assert first.weaker(old)
    plain.final_logits_bias.zero_()
    assert known.fingerprint == base_fingerprint(plain)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_weights": False}),
        ("mistral", {"sliding_window": None}),
        ("t5", {"scale_decoder_outputs": False}),
    ],
)
def test_a_value_that_is_switched_off_counts(kind, changes):
    """False and null were left out, as if they were the defaults; here the class's default is neither."""
    pair = []
    for more in ({}, changes):
        settings = seq2seq_models.CONFIGS["T5"][1] if kind == "t5" else {**_SIZES, **CONFIGS[kind]}
        if kind == "mistral":
            settings = {name: value for name, value in settings.items() if name != "sliding_window"}
        torch.manual_seed(0)
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        pair.append(Base(kind, base_fingerprint(auto.from_config(AutoConfig.for_model(kind, **{**settings, **more})))))
    usual, off = pair
    assert next(iter(changes)) in usual.apart(off)
    assert not off.matches(usual)
    for base, other in (pair, reversed(pair)):  # a fingerprint of before does not say what is off
        old = {name: value for name, value in parse(base.fingerprint).facts.items() if name != SWITCHED_OFF}
        assert Base("old", _with_facts(base.fingerprint, old)).matches(other)
    broken = {**parse(usual.fingerprint).facts, SWITCHED_OFF: 1}
    assert Base("broken", _with_facts(usual.fingerprint, broken)).matches(usual)
