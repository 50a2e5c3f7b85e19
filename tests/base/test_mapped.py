"""Bases whose matrices stay in their files: what they compute, what they hold, what is written to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgeprompt.base.load import load_base
from edgeprompt.base.mapped import release, reserve, stand_ins
from tests.support.decoder_models import CONFIGS, tiny_decoder


def _saved(folder: Path, family: str, dtype: torch.dtype) -> Path:
    tiny_decoder(family).to(dtype).save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mapped_base_computes_what_a_loaded_one_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = _saved(tmp_path, family, dtype)
    plain, mapped = load_base(folder), load_base(folder, mapped=True)
    ids = torch.tensor([[5, 9, 3, 77, 123, 5, 5]])
    with torch.no_grad():
        want, got = plain.model(input_ids=ids).logits, mapped.model(input_ids=ids).logits
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert mapped.fingerprint == plain.fingerprint
    kinds = [value.dtype for value in mapped.model.parameters() if value.dim() == 2]
    # Learned positions are read in ways of their own, and are in memory.
    assert kinds.count(dtype) >= len(kinds) - 1
    assert all(value.dtype == torch.float32 for value in mapped.model.parameters() if value.dim() == 1)
    tied = plain.model.get_input_embeddings().weight is plain.model.get_output_embeddings().weight
    assert tied == (mapped.model.get_input_embeddings().weight is mapped.model.get_output_embeddings().weight)


def test_released_pages_come_back_from_the_file(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "llama", torch.bfloat16)
    model = load_base(folder, mapped=True).model
    stored = load_file(folder / "model.safetensors")
    for name, value in model.named_parameters():
        release(value)
        assert torch.equal(value, stored[name].to(value.dtype)), name
    own = torch.ones(3000)
    release(own)
    assert bool(own.all())


def test_stand_ins_have_shapes_and_are_taken_away_again(tmp_path: Path) -> None:
    model = load_base(_saved(tmp_path, "gpt2", torch.bfloat16), mapped=True).model
    before = dict(model.named_parameters())
    with stand_ins(model, least=20_000) as originals:
        for name, value in model.named_parameters():
            assert value.dtype == torch.float32
            assert value.shape == before[name].shape
            if value.numel() >= 20_000 and value.dim() == 2:
                assert originals[value.data_ptr()] is before[name]
            else:
                assert torch.equal(value, before[name].float())
    assert all(value is before[name] for name, value in model.named_parameters())
    assert not bool(reserve((30, 5)).any())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradients_flow_through_a_mapped_base(family: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path, family, torch.bfloat16)
    gradients = []
    for loaded in (load_base(folder), load_base(folder, mapped=True)):
        table = loaded.model.get_input_embeddings()(torch.arange(3, 12)[None]).detach()
        prompt = table[:, :4].clone().requires_grad_()
        logits = loaded.model(inputs_embeds=torch.cat([prompt, table], 1)).logits
        logits.log_softmax(-1)[0, :, 5].sum().backward()
        assert prompt.grad is not None
        gradients.append(prompt.grad)
        assert all(parameter.grad is None for parameter in loaded.model.parameters())
    want, got = gradients
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_padding_token_behind_the_rows_of_a_text(family: str, tmp_path: Path) -> None:
    """SmolLM2's is 2, and a text may have one or two different tokens."""
    model = tiny_decoder(family).to(torch.bfloat16)
    model.config.pad_token_id = 100
    model.save_pretrained(tmp_path / "base")
    plain, mapped = load_base(tmp_path / "base"), load_base(tmp_path / "base", mapped=True)
    assert mapped.model.get_input_embeddings().padding_idx == 100
    for ids in ([5], [5, 5, 9], [100, 5], [100]):
        with torch.no_grad():
            want, got = (one.model(input_ids=torch.tensor([ids])).logits for one in (plain, mapped))
        assert torch.equal(got, want)
    assert mapped.model.get_input_embeddings().padding_idx == 100
