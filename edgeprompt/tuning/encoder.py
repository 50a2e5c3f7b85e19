"""A frozen encoder with a soft prompt: virtual tokens in its text, or deep prompts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from edgeprompt.errors import TemplateError
from edgeprompt.package.manifest import Geometry
from edgeprompt.tuning.prompted import Prompted, pad_right
from edgeprompt.tuning.soft_prompt import SoftPrompt


class EncoderPrompt(Prompted):
    """An encoder, bare or inside a masked language model, with a soft prompt or none."""

    def __init__(self, loaded: Any, geometry: Geometry, soft: SoftPrompt | None, *, mask_token: int = -1) -> None:
        """`loaded`: an `edgeprompt.base.load.LoadedBase`; `mask_token`: id of the token that cloze words stand for."""
        super().__init__(loaded.model, soft, vocab_size=geometry.vocab_size)
        self._geometry, self._family, self._mask_token = geometry, loaded.family, mask_token
        config = loaded.config
        self._has_types = getattr(config, "type_vocab_size", 0) > 1
        self._has_positions = loaded.family.position_ids and getattr(config, "position_biased_input", True)

    def shared(self) -> torch.Tensor | None:
        """The prompt: embeddings, or keys and values."""
        return None if self.soft is None else self.soft().to(self.base.dtype)

    def start_prefix(self, ids: Sequence[int]) -> torch.Tensor | None:
        """An encoder keeps no keys and values of a text."""
        return None

    def states(
        self,
        texts: Sequence[Sequence[int]],
        types: Sequence[Sequence[int]] | None = None,
        shared: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states, and which positions hold text.

        Args:
            texts: token ids, those of virtual tokens at or above `vocab_size`.
            types: segment of every token; None or empty rows: 0.
            shared: `self.shared()`; None computes it.

        Returns:
            states [batch_size, sequence_length, hidden_size], virtual tokens included, and a bool mask
            [batch_size, sequence_length] of positions that are neither virtual nor padding.
        """
        from edgeprompt.base.encoder_attention import Call, deep_prompts

        shared = self.shared() if shared is None else shared
        device, base = self.base.device, self.base.base_model
        deep = shared is not None and self.soft.is_prefix
        before = self.soft.num_virtual_tokens if deep else 0
        ids, mask = pad_right(texts, before)
        mask = mask.to(device)
        inputs: dict[str, Any] = {
            "inputs_embeds": self.embed(ids, None if deep else shared),
            "attention_mask": mask[:, before:],
        }
        if self._has_types and types is not None and any(map(any, types)):
            inputs["token_type_ids"] = pad_right([[*row, *[0] * (len(text) - len(row))] for text, row in zip(
                texts, types, strict=True)])[0].to(device)  # fmt: skip
        context: Any = nullcontext()
        if deep and shared is not None:
            size = self._geometry
            if self._has_positions:
                places = before + torch.arange(ids.shape[1], device=device)
                if size.max_positions:
                    places = places.clamp(max=size.max_positions - 1)  # padding alone can reach beyond
                inputs["position_ids"] = places.expand(len(ids), -1) + size.position_offset
            wide = shared[:, :, None].expand(-1, -1, len(ids), -1, -1, -1)
            context = deep_prompts(base, Call([(layer[0], layer[1]) for layer in wide], mask))
        with self._family.patch(base) if deep else nullcontext(), context:
            states: torch.Tensor = base(**inputs).last_hidden_state
        real = mask[:, before:].bool() & (ids < self.vocab_size).to(device)
        return states, real

    def logits(
        self,
        texts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        shared: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [len(texts), vocab_size] at each text's mask token (masked language models).

        Raises:
            TemplateError: an answer has several tokens; a mask stands for one.
        """
        if any(len(answer) for several in answers for answer in several):
            raise TemplateError("a label word has several tokens, and a mask stands for one; choose words of one token")
        states, _ = self.states(texts, None, shared)
        places = torch.tensor([list(text).index(self._mask_token) for text in texts], device=states.device)
        rows = torch.arange(len(texts), device=states.device)
        logits: torch.Tensor = self._family.lm_logits(self.base, states[rows, places])
        return logits
