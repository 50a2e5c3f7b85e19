"""A frozen encoder-decoder with a soft prompt: embeddings in the encoder's text, or a prefix in the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgeprompt.tuning.prompted import PromptedLM, pad_right
from edgeprompt.tuning.soft_prompt import SoftPrompt


class Seq2SeqPrompt(PromptedLM):
    """An encoder-decoder with a soft prompt. The encoder runs once per text, whatever the number of answers."""

    def __init__(self, base: Any, soft: SoftPrompt, *, vocab_size: int, start: Sequence[int]) -> None:
        """`start`: what the decoder reads before an answer."""
        super().__init__(base, soft, vocab_size=vocab_size)
        self._start = list(start)

    def shared(self) -> torch.Tensor:
        """The prompt: embeddings, or the decoder's prefix."""
        made: torch.Tensor = self.soft().to(self.base.dtype)
        return made

    def start_prefix(self, ids: Sequence[int]) -> torch.Tensor | None:
        """The decoder's keys and values of `ids`, with nothing for the encoder to say."""
        from transformers.modeling_outputs import BaseModelOutput

        device = self.base.device
        silence = torch.zeros(1, 1, self.base.config.d_model, device=device, dtype=self.base.dtype)
        cache = self._cache()
        self.base(
            encoder_outputs=BaseModelOutput(last_hidden_state=silence),
            decoder_input_ids=torch.tensor([list(ids)], device=device),
            past_key_values=cache,
            use_cache=True,
        )
        layers = cache.self_attention_cache.layers
        return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])

    def logits(
        self,
        texts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        shared: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `PromptedLM.logits`; `shared` is `self.shared()`."""
        from transformers.modeling_outputs import BaseModelOutput

        shared = self.shared() if shared is None else shared
        device = self.base.device
        ids, mask = pad_right(texts)
        mask = mask.to(device)
        embedded = self.embed(ids, None if self.soft.is_prefix else shared)
        states = self.base.get_encoder()(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        owner = torch.tensor([index for index, several in enumerate(answers) for _ in several], device=device)
        rows = [[*self._start, *answer] for several in answers for answer in several]
        first = len(self._start) - 1
        places = [(index, place) for index, row in enumerate(rows) for place in range(first, len(row))]
        inputs: dict[str, Any] = {}
        if self.soft.is_prefix:
            cache = self._cache()
            for layer, (key, value) in enumerate(shared):
                cache.self_attention_cache.update(
                    key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1), layer
                )
            inputs = {"past_key_values": cache}
        with self.gathering(places):
            logits: torch.Tensor = self.base(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[owner]),
                attention_mask=mask[owner],
                decoder_input_ids=pad_right(rows)[0].to(device),
                use_cache=self.soft.is_prefix,
                **inputs,
            ).logits
        return logits

    def _cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        # Without the config: it may count the encoder's layers.
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
