"""What the parts of a prompt file must be, and how they go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeprompt import names
from edgeprompt.prompts.verbalizer import AGGREGATIONS

if TYPE_CHECKING:
    from edgeprompt.prompts.file import Array, PromptFile

MAX_VIRTUAL_TOKENS = 65_536
HEAD_INPUTS = ("first", "first_text", "pooler", "mean", "mean_all", "last", "tokens", "tokens_unshifted")
HEAD_OPERATIONS = ("linear", "tanh", "gelu", "relu", "silu", "layer_norm")
PROBLEM_TYPES = ("single_label", "multi_label", "regression")


def check_tensors(prompt: PromptFile, tensors: Mapping[str, Array]) -> None:
    """Refuse tensors and words that the format does not have.

    Raises:
        ValueError: says which, and what is allowed.
    """
    known = {names.PROMPT_EMBEDDINGS: 2, names.PAST_KEY_VALUES: 5, f"encoder_{names.PAST_KEY_VALUES}": 5}
    for name, tensor in tensors.items():
        rank = known.get(name)
        if rank is None and not name.startswith("head."):
            raise ValueError(f"unknown tensor {name!r}; known: {', '.join(known)}, head.*")
        if tensor.dtype not in (np.float32, np.float16):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, allowed: float32, float16")
        if rank is not None and tensor.ndim != rank:
            raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, {rank} dimensions are needed")
        if tensor.size == 0:
            raise ValueError(f"tensor {name!r} is empty, shape {list(tensor.shape)}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} holds NaN or infinity")
    if prompt.num_virtual_tokens > MAX_VIRTUAL_TOKENS:
        raise ValueError(f"{prompt.num_virtual_tokens} virtual tokens, at most {MAX_VIRTUAL_TOKENS} are allowed")
    if prompt.prompt_embeddings is not None and prompt.past_key_values is not None:
        raise ValueError("both prompt_embeddings and past_key_values; a prompt has one of them")
    if not tensors:
        raise ValueError("no tensor")
    if prompt.method not in names.METHODS and prompt.method != "head":
        raise ValueError(f"method is {prompt.method!r}, allowed: {', '.join(names.METHODS)}, head")
    if prompt.task not in names.TASKS:
        raise ValueError(f"task is {prompt.task!r}, allowed: {', '.join(names.TASKS)}")
    if prompt.calibration and len(prompt.calibration) != len(prompt.verbalizer):
        raise ValueError(f"{len(prompt.calibration)} calibration values for {len(prompt.verbalizer)} labels")
    if prompt.verbalizer_aggregation not in AGGREGATIONS:
        allowed = ", ".join(AGGREGATIONS)
        raise ValueError(f"verbalizer_aggregation is {prompt.verbalizer_aggregation!r}, allowed: {allowed}")
    if prompt.verbalizer_aggregation != "sum" and not prompt.verbalizer:
        raise ValueError(f"verbalizer_aggregation is {prompt.verbalizer_aggregation!r}, and there is no verbalizer")
    _check_head(prompt)


def _check_head(prompt: PromptFile) -> None:
    spec = prompt.head_spec
    if spec is None:
        if prompt.head:
            raise ValueError("head tensors without a head description")
        return
    if spec.input not in HEAD_INPUTS:
        raise ValueError(f"head input is {spec.input!r}, allowed: {', '.join(HEAD_INPUTS)}")
    if spec.problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {spec.problem_type!r}, allowed: {', '.join(PROBLEM_TYPES)}")
    for step in spec.steps:
        if step.operation not in HEAD_OPERATIONS:
            raise ValueError(f"head operation is {step.operation!r}, allowed: {', '.join(HEAD_OPERATIONS)}")
        if step.operation in ("linear", "layer_norm") and f"{step.name}.weight" not in prompt.head:
            raise ValueError(
                f"the head needs tensor head.{step.name}.weight; there: {', '.join(prompt.head) or 'none'}"
            )
