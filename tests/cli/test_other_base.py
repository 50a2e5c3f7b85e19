"""A prompt of a base, through the command line, on a package of the same base trained further: refused everywhere."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

MATRIX = {
    "decoder": "q_proj.weight",
    "encoder": "attention.self.query.weight",
    "encoder-decoder": "SelfAttention.q.weight",
}


@pytest.fixture
def base(tiny_llama_base, encoder_base, seq2seq_base):
    made = {"decoder": lambda: tiny_llama_base, "encoder": lambda: encoder_base("BERT")}
    return made | {"encoder-decoder": lambda: seq2seq_base("T5")}


@pytest.mark.parametrize("kind", MATRIX)
def test_an_old_prompt_on_a_changed_base_is_refused(kind, base, cli, refused, tmp_path):
    before, after = base[kind](), tmp_path / "merged"
    shutil.copytree(before, after)
    tensors = load_file(after / "model.safetensors")
    name = next(name for name in tensors if name.endswith(MATRIX[kind]))
    torch.manual_seed(0)
    delta = torch.randn(len(tensors[name]), 2) @ torch.randn(2, tensors[name].shape[1])
    tensors[name] += 0.1 * tensors[name].std() / delta.std() * delta
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    data, prompt, package = tmp_path / "data.csv", tmp_path / "old.safetensors", tmp_path / "package"
    data.write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 8)
    tune = ("--steps", 1, "--max-length", 64, "--virtual-tokens", 2, "--init", "random")
    assert cli("tune", before, data, "-o", prompt, *tune).exit_code == 0
    assert cli("export", after, "-o", package, "--precision", "fp32").exit_code == 0
    why = "one of both was fine-tuned or merged"
    assert why in refused("run", package, "--prompt", prompt, "a film")
    assert why in refused("eval", package, data, "--prompt", prompt)
    assert why in refused("export", after, "-o", tmp_path / "more", "--precision", "fp32", "--prompt", prompt)
    assert why in refused("tune", after, data, "-o", tmp_path / "more.safetensors", *tune, "--resume", prompt)
    assert why in refused("validate", package, "--against", before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "merged", "old.safetensors", "package"]
