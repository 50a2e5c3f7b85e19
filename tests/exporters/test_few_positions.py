"""Bases with few positions are checked within them; the checks used to run beyond, which ONNX Runtime refuses."""

import pytest

from edgeprompt.errors import UnsupportedError
from exporters import export_model


def decoder(save_tiny, positions):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return save_tiny(LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, max_position_embeddings=positions)))


def learned(save_tiny, positions):
    from transformers import GPT2Config, GPT2LMHeadModel

    return save_tiny(GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=positions)))


def encoder(save_tiny, positions):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return save_tiny(BertForMaskedLM(BertConfig(vocab_size=512, **sizes, max_position_embeddings=positions)))


def encoder_decoder(save_tiny, positions):
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return save_tiny(
        BartForConditionalGeneration(BartConfig(vocab_size=512, **sizes, **heads, max_position_embeddings=positions))
    )


KINDS = [decoder, learned, encoder, encoder_decoder]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [12, pytest.param(20, marks=pytest.mark.slow)])
def test_a_base_with_few_positions_exports(kind, positions, save_tiny, tmp_path):
    report = export_model(kind(save_tiny, positions), tmp_path / "package")
    assert report.manifest.geometry.max_positions == positions
    assert report.manifest.quality_gate == "passed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_with_fewer_is_refused_before_the_work(kind, save_tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="has 11 positions, and 12 is the least"):
        export_model(kind(save_tiny, 11), tmp_path / "package")
    assert not (tmp_path / "package").exists()
