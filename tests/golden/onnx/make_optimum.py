"""Graphs as Optimum exports them, of tiny random models.

    python3.11 -m venv other
    other/bin/pip install torch==2.13.0 "optimum-onnx[onnxruntime]==0.1.0" "transformers<4.58"
    other/bin/python make_optimum.py tests/golden/onnx

optimum-onnx cannot be installed beside transformers 5, hence an environment of its own. The tests quantise these
graphs with ONNX Runtime's own tools, as onnx-community does.
"""

import shutil
import sys
from pathlib import Path

import torch
from optimum.exporters.onnx import export, onnx_export_from_model
from optimum.exporters.onnx.model_configs import GPT2OnnxConfig
from optimum.onnx import merge_decoders
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

OUT = Path(sys.argv[1])
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def save(name, model, task, remove=()):
    torch.manual_seed(0)
    model.eval().save_pretrained(OUT / name)
    onnx_export_from_model(model, OUT / name, task=task, do_validation=False)
    for file in remove:
        (OUT / name / file).unlink()


def save_merged(name, source):
    """One file for both steps, as Optimum wrote decoders until 2023 and hubs still have them."""
    model = GPT2LMHeadModel.from_pretrained(OUT / source).eval()
    (OUT / name).mkdir(exist_ok=True)
    parts = []
    for past in (False, True):
        parts.append(OUT / name / f"past_{past}.onnx")
        config = GPT2OnnxConfig(model.config, task="text-generation", use_past=True, use_past_in_inputs=past)
        export(model=model, config=config, output=parts[-1], opset=18)
    merge_decoders(*parts, save_path=OUT / name / "decoder_model_merged.onnx", strict=False)
    for part in parts:
        part.unlink()
    for file in ("config.json", "generation_config.json"):
        shutil.copy(OUT / source / file, OUT / name)


def main():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **ENDS)
    save("gpt2", GPT2LMHeadModel(config), "text-generation-with-past")
    save_merged("gpt2-merged", "gpt2")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **ENDS,
    )
    save("llama", LlamaForCausalLM(config), "text-generation-with-past")
    config = BertConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    save("bert", BertModel(config), "feature-extraction")
    config = T5Config(
        vocab_size=512,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        initializer_factor=3.0,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=0,
    )
    merged, apart = "decoder_model_merged.onnx", ("decoder_model.onnx", "decoder_with_past_model.onnx")
    save("t5", T5ForConditionalGeneration(config), "text2text-generation-with-past", remove=[merged])
    config = BartConfig(
        vocab_size=512,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        init_std=0.3,
        scale_embedding=True,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        **ENDS,
    )
    save("bart", BartForConditionalGeneration(config), "text2text-generation-with-past", remove=apart)


main()
