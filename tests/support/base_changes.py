"""Changes of a base model that its fingerprint must notice, for all three architectures."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

KINDS = ("llama", "qwen2", "gpt2", "bert", "t5", "bart")
EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
EPSILON_KINDS = ("llama", "qwen2", "gpt2", "bert", "t5")
SWAPS = {  # two matrices of one shape in one layer
    "llama": ("k_proj.weight", "v_proj.weight"),
    "qwen2": ("gate_proj.weight", "up_proj.weight"),
    "gpt2": None,  # has no two of one shape
    "bert": ("self.key.weight", "self.value.weight"),
    "t5": ("SelfAttention.k.weight", "SelfAttention.v.weight"),
    "bart": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
}
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")


def parameters(model: Any, pattern: str) -> list[Any]:
    """Parameters whose name a pattern finds."""
    found = [value for name, value in model.named_parameters() if re.search(pattern, name)]
    assert found, pattern
    return found


def merge_lora(model: Any, kind: str) -> None:
    """A product of rank 4, its largest entry half of the weight's deviation."""
    import torch

    pattern = {"gpt2": r"c_attn\.weight", "bert": r"self\.query\.weight", "t5": r"SelfAttention\.q\.weight"}
    weight = parameters(model, pattern.get(kind, r"q_proj\.weight"))[-1]
    delta = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
    weight += delta * (0.5 * weight.std() / delta.abs().max())


def merge_ia3(model: Any, kind: str) -> None:
    """Positive factors of the rows, near 1, as IA3 learns them: no sign changes."""
    import torch

    pattern = {"gpt2": r"c_fc\.weight", "bert": r"self\.key\.weight", "t5": r"SelfAttention\.k\.weight"}
    for weight in parameters(model, pattern.get(kind, r"k_proj\.weight")):
        weight *= 1 + 0.1 * torch.rand(len(weight), 1)


def train_norms(model: Any, kind: str) -> None:
    """The weights of all norms, by 2 %."""
    import torch

    for weight in parameters(model, r"(norm|ln_\w+|LayerNorm)\.weight"):
        weight += 0.02 * torch.randn_like(weight)


def train_biases(model: Any, kind: str) -> None:
    """All biases, by 2 % of their size and never over zero."""
    import torch

    for bias in parameters(model, r"\.bias$"):
        bias.copy_(torch.where(bias == 0, 0.01 * torch.randn_like(bias), bias * (1 + 0.02 * torch.rand_like(bias))))


def swap_in_layer(model: Any, kind: str) -> None:
    """Two matrices of one shape in one layer."""
    _swap(*(parameters(model, re.escape(name))[0] for name in SWAPS[kind] or ()))


def swap_layers(model: Any, kind: str) -> None:
    """One matrix of two layers."""
    weights = parameters(model, r"(o_proj|c_fc|intermediate\.dense|DenseReluDense\.wo|fc1)\.weight")
    _swap(weights[0], weights[1])


def scale_layer(model: Any, kind: str) -> None:
    """All of the last layer's matrices, by 1.02."""
    for weight in parameters(model, r"\.1\..*weight"):
        if weight.dim() > 1:
            weight *= 1.02


def change_epsilon(model: Any, kind: str) -> None:
    """The epsilon of the norms; BART's is fixed, so its embedding is scaled."""
    config = model.config
    name = next((name for name in EPSILON if hasattr(config, name)), None)
    if name is None:
        config.scale_embedding = True
    else:
        setattr(config, name, getattr(config, name) * 10)


def change_rope(model: Any, kind: str) -> None:
    """The base of rotary positions; where there are none, T5's buckets."""
    if kind == "t5":
        model.config.relative_attention_max_distance = 64
    else:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500000.0}


def scale_rope(model: Any, kind: str) -> None:
    """A scaling of rotary positions."""
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "linear", "factor": 2.0}


def change_activation(model: Any, kind: str) -> None:
    """Another activation function."""
    config = model.config
    name = next(n for n in ("hidden_act", "activation_function", "dense_act_fn") if hasattr(config, n))
    setattr(config, name, "relu")


def change_heads(model: Any, kind: str) -> None:
    """Half as many heads of double the size: no tensor changes its shape."""
    config = model.config
    name = next(name for name in reversed(HEADS) if name in config.to_dict())
    setattr(config, name, 2)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads, config.head_dim = 1, 16


CHANGES: dict[str, tuple[Callable[[Any, str], None], tuple[str, ...]]] = {
    "merged LoRA": (merge_lora, KINDS),
    "merged IA3": (merge_ia3, KINDS),
    "trained norms": (train_norms, KINDS),
    "trained biases": (train_biases, ("gpt2", "bert", "bart", "qwen2")),
    "two matrices of a layer swapped": (swap_in_layer, tuple(kind for kind in KINDS if SWAPS[kind])),
    "a matrix of two layers swapped": (swap_layers, KINDS),
    "a layer scaled": (scale_layer, KINDS),
    "epsilon": (change_epsilon, KINDS),
    "rotary or relative positions": (change_rope, ("llama", "qwen2", "t5")),
    "rotary scaling": (scale_rope, ("llama", "qwen2")),
    "activation": (change_activation, KINDS),
    "heads": (change_heads, KINDS),
}
CASES = [(what, kind) for what, (_, kinds) in CHANGES.items() for kind in kinds]


def changed(model: Any, what: str, kind: str) -> Any:
    """A changed copy."""
    import torch

    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        CHANGES[what][0](other, kind)
    return other


def _swap(one: Any, other: Any) -> None:
    before = one.clone()
    one.copy_(other)
    other.copy_(before)
