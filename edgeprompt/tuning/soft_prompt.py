"""PEFT's prompt encoders: built, started from a text, read out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprompt import names
from edgeprompt.errors import UnsupportedError
from edgeprompt.package.manifest import Geometry
from edgeprompt.package.tokenizer import naming
from edgeprompt.tuning.options import TuneOptions

PREFIX_METHODS = ("prefix-tuning", "p-tuning-v2")
_RANKS = 4
"""Rank of a task's factor in multitask prompt tuning."""


class SoftPrompt(nn.Module):
    """One task's trainable part: PEFT's prompt encoder, without the base it stands in front of.

    Attributes:
        task: index of the task that `forward` composes the prompt of (multitask prompt tuning).
        encoder: PEFT's prompt encoder; its parameters are the trainable ones.
        is_prefix: whether it makes keys and values for every layer (else embeddings).
    """

    def __init__(self, geometry: Geometry, options: TuneOptions, *, task_type: str, num_tasks: int = 1) -> None:
        """`task_type`: PEFT's name of the base's kind, as "CAUSAL_LM"; `num_tasks`: of multitask prompt tuning."""
        super().__init__()
        self.task = 0
        self.is_prefix = options.method in PREFIX_METHODS
        self.num_virtual_tokens = options.num_virtual_tokens
        self._geometry = geometry
        self._config, encoder = _encoder(geometry, options, task_type, num_tasks)
        self.encoder: Any = encoder.float()
        self._is_multitask = hasattr(encoder, "prefix_task_cols")

    def as_peft(self, base: Any) -> Any:
        """A PEFT model around `base` with this very prompt, for adapters.

        Raises:
            UnsupportedError: PEFT does not offer the method for this base.
        """
        from peft import get_peft_model

        try:
            model = get_peft_model(base, copy.deepcopy(self._config))
        except (ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(
                f"PEFT has no {self._config.peft_type.value} adapter for {base.config.model_type!r} ({reason}); "
                "leave out --adapter"
            ) from error
        model.prompt_encoder["default"] = self.encoder
        return model

    def forward(self) -> torch.Tensor:
        """The prompt: embeddings [num_virtual_tokens, embedding_size], or, for a prefix, keys and values
        [num_layers, 2, num_key_value_heads, num_virtual_tokens, head_size]."""
        tokens = torch.arange(self.num_virtual_tokens, device=self.encoder.embedding.weight.device)
        task = {"task_ids": torch.tensor([self.task], device=tokens.device)} if self._is_multitask else {}
        made: torch.Tensor = self.encoder(tokens[None], **task)[0]
        if not self.is_prefix:
            return made
        size = self._geometry
        view = made.view(self.num_virtual_tokens, size.num_layers, 2, size.num_key_value_heads, size.head_size)
        return view.permute(1, 2, 3, 0, 4)

    @torch.no_grad()
    def start_from(self, target: torch.Tensor) -> None:
        """Set the parameters so that `forward` gives `target`; behind a network, its last layer is solved for."""
        if self.is_prefix:
            target = target.permute(3, 0, 1, 2, 4).reshape(self.num_virtual_tokens, -1)
        if self._is_multitask:
            # Every task's factor starts as 1; the factors behind the first rank start from noise times zero.
            columns, rows = self.encoder.prefix_task_cols, self.encoder.prefix_task_rows
            columns[..., 0] = 1
            rows.zero_()[:, 0] = 1
        network = getattr(self.encoder, "mlp_head", None) or getattr(self.encoder, "transform", None)
        if network is None:
            self.encoder.embedding.weight.copy_(target)
            return
        features = self.encoder.embedding.weight[None]
        if hasattr(self.encoder, "lstm_head"):
            features = self.encoder.lstm_head(features)[0]
        features = network[:-1](features)[0]
        # The least-squares solution of smallest norm: exact as long as there are as many features as virtual tokens.
        last, mean = network[-1], target.mean(0)
        last.bias.copy_(mean)
        last.weight.copy_((torch.linalg.pinv(features.double()) @ (target - mean).double()).T)

    def freeze_first(self) -> None:
        """Keep the first position of a prefix as it is: attention rests on it (Eyuboglu et al. 2025, "Cartridges")."""
        weight: torch.Tensor = self.encoder.embedding.weight
        mask = torch.ones_like(weight)
        mask[0] = 0
        weight.register_hook(lambda gradient: gradient * mask.to(gradient.device))  # type: ignore[no-untyped-call]

    def array(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """`forward` as float32 in numpy."""
        with torch.no_grad():
            return np.ascontiguousarray(self().float().cpu().numpy())


def _encoder(size: Geometry, options: TuneOptions, task_type: str, num_tasks: int) -> tuple[Any, nn.Module]:
    """PEFT's config and prompt encoder for a method."""
    from peft import (
        MultitaskPromptTuningConfig,
        MultitaskPromptTuningInit,
        PrefixEncoder,
        PrefixTuningConfig,
        PromptEmbedding,
        PromptEncoder,
        PromptEncoderConfig,
        PromptTuningConfig,
    )
    from peft.tuners import MultitaskPromptEmbedding

    common: dict[str, Any] = {
        "task_type": task_type,
        "num_virtual_tokens": options.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": size.num_layers,
        "token_dim": size.embedding_size or size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
    }
    if options.method in PREFIX_METHODS:
        # Under grouped-query attention PEFT's names mean the geometry of keys and values.
        common |= {
            "token_dim": size.num_key_value_heads * size.head_size,
            "num_attention_heads": size.num_key_value_heads,
        }
        hidden = size.hidden_size if options.projection else None
        prefix = PrefixTuningConfig(**common, prefix_projection=options.projection, encoder_hidden_size=hidden)
        return prefix, PrefixEncoder(prefix)
    if options.method == "p-tuning":
        network = PromptEncoderConfig(
            **common, encoder_reparameterization_type=options.encoder.upper(), encoder_hidden_size=size.hidden_size
        )
        return network, PromptEncoder(network)
    if options.method == "prompt-tuning":
        plain = PromptTuningConfig(**common, prompt_tuning_init="RANDOM")
        return plain, PromptEmbedding(plain, None)
    if options.method == "multitask-prompt-tuning":
        several = MultitaskPromptTuningConfig(
            **common,
            prompt_tuning_init=MultitaskPromptTuningInit.RANDOM,
            num_tasks=num_tasks,
            num_ranks=_RANKS,
        )
        return several, MultitaskPromptEmbedding(several, None)
    raise UnsupportedError(f"method {options.method!r} is not offered for this base; known: {', '.join(names.METHODS)}")


def start_ids(
    options: TuneOptions, tokenizer: Any, vocab_size: int, words: Sequence[str], purpose: str
) -> list[int] | None:
    """Token ids whose embeddings (or keys and values) the prompt starts from; None for a random start.

    A text is repeated or cut to the number of virtual tokens, as PEFT does.
    """
    count = options.num_virtual_tokens
    if options.init == "random":
        return None
    if options.init == "vocab":
        return [int(value) for value in np.random.default_rng([options.seed, 5]).integers(0, vocab_size, count)]
    text = "".join(words) if options.init == "labels" and words else options.init_text or purpose
    with naming("the text that the prompt starts from"):
        ids = tokenizer.encode(text, add_special_tokens=False) or [0]
    return (ids * math.ceil(count / len(ids)))[:count]
