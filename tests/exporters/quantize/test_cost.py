"""int8: what rounding costs is told by a formula of the factors, and descent finds factors that cost less."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from edgeprompt.base.load import load_base
from exporters import decoder_only, export_model
from exporters.quantize.cost import Cost
from exporters.quantize.observe import VIRTUAL, observe

TOKENS, ROWS, COLUMNS, BLOCK = 512, 48, 64, 32


def layer() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Inputs with a few large columns, gradients and weights of two readers."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn((TOKENS, COLUMNS), generator=random)
    inputs[:, ::16] *= torch.tensor([4.0, 32.0, 128.0, 8.0])
    gradients = [torch.randn((TOKENS, ROWS), generator=random) for _ in range(2)]
    weights = [torch.randn((ROWS, COLUMNS), generator=random) for _ in range(2)]
    return inputs, gradients, weights


def rounded(values: torch.Tensor, block: int) -> torch.Tensor:
    runs = values.reshape(len(values), -1, block)
    steps = runs.abs().amax(2, keepdim=True) / 127
    return (torch.round(runs / steps) * steps).reshape(values.shape)


@pytest.mark.parametrize("block", [None, BLOCK])
def test_the_formula_tells_what_rounding_costs(block: int | None) -> None:
    inputs, gradients, weights = layer()
    cost = Cost(inputs, gradients, weights, predicted=TOKENS, levels=127)
    exponents = torch.zeros(COLUMNS)
    exponents[::16] = 2.0
    factors, run = torch.exp2(exponents), block or COLUMNS
    fed = rounded(inputs / factors, run) * factors - inputs
    measured = 0.0
    for gradient, weight in zip(gradients, weights, strict=True):
        lost = rounded(weight * factors, run) / factors - weight
        measured += 0.5 * float(((inputs @ lost.T) * gradient).sum(1).square().sum()) / TOKENS
    by_input = sum(gradient @ weight for gradient, weight in zip(gradients, weights, strict=True))
    measured += 0.5 * float((fed * by_input).square().sum()) / TOKENS
    # The largest value of a run loses nothing, which the formula does not know.
    assert measured < cost.of(exponents, block) < 2 * measured


def test_descent_follows_the_formula() -> None:
    cost = Cost(*layer(), predicted=TOKENS, levels=127)
    exponents = torch.linspace(-0.7, 0.9, COLUMNS)
    gradient = torch.empty(COLUMNS)
    cost._value(torch.exp2(exponents), gradient)
    for column in (0, 5, 32, 40):
        nudge = torch.zeros(COLUMNS)
        nudge[column] = 1e-3
        slope = (cost.of(exponents + nudge) - cost.of(exponents - nudge)) / (2e-3 * math.log(2))
        assert float(gradient[column]) == pytest.approx(slope, rel=0.05, abs=1e-3 * cost.of(exponents))


def test_the_factors_found_cost_least() -> None:
    inputs, gradients, weights = layer()
    cost = Cost(inputs, gradients, weights, predicted=TOKENS, levels=127)
    found = cost.least()
    assert bool((found == found.round()).all())
    # Far below no factors, and below those that the largest values alone would give.
    assert cost.of(found) < 0.1 * cost.of(torch.zeros(COLUMNS))
    largest = torch.log2(inputs.abs().amax(0))
    for share in (0.5, 0.65, 0.8):
        assert cost.of(found) < cost.of(torch.round(share * (largest - largest.median())))
    # A factor of all columns is none.
    assert cost.of(found + 3) == pytest.approx(cost.of(found), rel=1e-4)


def test_activations_of_prompts_are_seen(tiny_llama_base: Path, tmp_path: Path) -> None:
    loaded = load_base(tiny_llama_base)
    texts = tmp_path / "texts.txt"
    texts.write_text("This text has more words than the other one, so it is the first.\nThis one is second, shorter.")
    plain = observe(loaded, texts, closely=True)
    noisy = observe(loaded, texts, closely=True, virtual=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = (torch.cat(plain.inputs[name]) != torch.cat(noisy.inputs[name])).any(1)
    owners = torch.cat(plain.texts)
    assert not bool(changed[owners == 0].any())
    assert changed[owners == 1].nonzero()[:, 0].tolist() == list(range(VIRTUAL))


def test_a_large_base_is_not_observed_closely(tiny_llama_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_base(tiny_llama_base)
    seen = []
    monkeypatch.setattr(decoder_only, "observe", lambda *given, **how: seen.append(how) or observe(*given, **how))
    for most in (decoder_only.MOST_PARAMETERS, 0):
        monkeypatch.setattr(decoder_only, "MOST_PARAMETERS", most)
        export_model(loaded, tiny_llama_base.parent / f"int8-{most}", precision="int8", force=True)
    assert [how["closely"] for how in seen] == [True, False]
