"""A frozen decoder with a soft prompt: logits at chosen positions of a batch, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from edgeprompt.errors import UnsupportedError
from edgeprompt.tuning.soft_prompt import SoftPrompt

Prefix: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, num_key_value_heads, num_virtual_tokens, head_size] of every layer."""


class CausalPrompt(nn.Module):
    """A base with a soft prompt.

    A prompt in front of the text is the same for all rows, and causal attention makes its keys and values independent
    of them: they are computed once for a batch. Rows are padded on the right, so that positions and masks are the
    plain ones. The output layer sees only the positions that are asked for.
    """

    def __init__(self, base: Any, soft: SoftPrompt, *, vocab_size: int, prompt_leads: bool) -> None:
        """Args: base: transformers causal LM; `prompt_leads`: whether all virtual tokens stand in front."""
        super().__init__()
        self.base = base
        self.soft = soft
        self._vocab_size = vocab_size
        self._leads = prompt_leads
        self._wanted: tuple[torch.Tensor, torch.Tensor] | None = None
        base.get_output_embeddings().register_forward_pre_hook(self._gather)

    def train(self, mode: bool = True) -> CausalPrompt:
        """As `nn.Module.train`, but the frozen base stays in evaluation mode: no dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def prefix(self) -> Prefix:
        """What stands before every row, as keys and values; empty where the prompt stands inside the text."""
        made = self.soft()
        if self.soft.is_prefix:
            return [(layer[0][None], layer[1][None]) for layer in made.to(self.base.dtype)]
        return self.keys_values(made.to(self.base.dtype)) if self._leads else []

    def keys_values(self, embeddings: torch.Tensor) -> Prefix:
        """Keys and values of `embeddings` [count, hidden_size] at positions 0, 1, ..."""
        cache = self._cache()
        self.base.base_model(inputs_embeds=embeddings[None], past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def logits(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Logits [sum of len(positions[i]), vocab_size] at `positions[i]` of `rows[i]`, in order.

        Args:
            rows: token ids, those of virtual tokens at or above `vocab_size`.
            positions: places in the row as given.
            prefix: `self.prefix()`, where many batches share it; None computes it.
        """
        prefix = self.prefix() if prefix is None else prefix
        skipped = self.soft.num_virtual_tokens if prefix and not self.soft.is_prefix else 0
        before = self.soft.num_virtual_tokens if prefix else 0
        device = self.base.device
        length = max(len(row) for row in rows) - skipped
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), before + length, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row) - skipped] = torch.tensor(row[skipped:])
            mask[index, : before + len(row) - skipped] = 1
        chosen = [(index, place - skipped) for index, places in enumerate(positions) for place in places]
        wanted = torch.tensor(chosen, device=device).T
        self._wanted = (wanted[0], wanted[1])
        inputs: dict[str, Any] = {"attention_mask": mask.to(device)}
        if prefix:
            cache = self._cache()
            for layer, (key, value) in enumerate(prefix):
                cache.update(key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1), layer)
            inputs |= {"input_ids": ids.to(device), "past_key_values": cache}
        else:
            inputs["inputs_embeds"] = self._embed(ids.to(device))
        try:
            logits: torch.Tensor = self.base(**inputs, use_cache=bool(prefix)).logits
        finally:
            self._wanted = None
        return logits

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        virtual = ids >= self._vocab_size
        embedded = self.base.get_input_embeddings()(ids.masked_fill(virtual, 0))
        rows = self.soft().to(embedded.dtype)[(ids - self._vocab_size).clamp(min=0)]
        return torch.where(virtual[..., None], rows, embedded)

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.base.config)

    def _gather(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Before the output layer: keep the hidden states of the wanted positions, [count, hidden_size]."""
        return (inputs[0][self._wanted], *inputs[1:]) if self._wanted is not None else None


def check_embedding(base: Any, hidden_size: int) -> None:
    """Refuse a base whose embedding rows are not hidden states (opt-350m projects them)."""
    width = base.get_input_embeddings().weight.shape[1]
    if width != hidden_size:
        raise UnsupportedError(
            f"base {base.config.model_type!r} has embeddings of {width} and hidden states of {hidden_size}; "
            "embedding prompts do not fit, use --method prefix-tuning"
        )
