"""Heads in NumPy."""

from __future__ import annotations

import numpy as np

from edgeprompt.heads.layers import apply_head
from edgeprompt.prompts.file import Head, HeadStep


def test_heads_in_numpy_are_those_of_torch() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.SiLU(), nn.ReLU()
    )
    module[2].weight.data.normal_()
    names = [
        ("linear", "0"),
        ("gelu", ""),
        ("layer_norm", "2"),
        ("linear", "3"),
        ("tanh", ""),
        ("silu", ""),
        ("relu", ""),
    ]
    states = torch.randn(5, 6) * 3
    tensors = {name: value.numpy() for name, value in module.state_dict().items()}
    got = apply_head(Head("first", tuple(HeadStep(*name) for name in names)), tensors, states.numpy())
    np.testing.assert_allclose(got, module(states).detach().numpy(), atol=1e-5)
