"""A frozen encoder-decoder with a soft prompt: embeddings in the encoder's text, or a prefix in the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeprompt.tuning.prompted import PromptedLM, pad_right
from edgeprompt.tuning.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class _State:
    """What one text leaves behind for its answers; keys and values of every layer are [1, heads, length, head_size]."""

    encoder: torch.Tensor
    decoder: list[tuple[torch.Tensor, torch.Tensor]]
    cross: list[tuple[torch.Tensor, torch.Tensor]]


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
        shared = self.shared() if shared is None else shared
        states, mask = self._encoded(texts, shared)
        owner = torch.tensor([index for index, several in enumerate(answers) for _ in several], device=states.device)
        rows = [[*self._start, *answer] for several in answers for answer in several]
        first = len(self._start) - 1
        places = [(index, place) for index, row in enumerate(rows) for place in range(first, len(row))]
        cache = self._prefixed(shared, len(rows)) if self.soft.is_prefix else None
        return self._decode(states[owner], mask[owner], rows, places, cache)

    def begin(
        self, texts: Sequence[Sequence[int]], shared: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[_State]]:
        """See `PromptedLM.begin`; a state is the encoder's, and the decoder's keys and values, padding cut off."""
        shared = self.shared() if shared is None else shared
        states, mask = self._encoded(texts, shared)
        cache = self._prefixed(shared, len(texts)) if self.soft.is_prefix else self._cache()
        places = [(index, len(self._start) - 1) for index in range(len(texts))]
        logits = self._decode(states, mask, [self._start] * len(texts), places, cache)
        return logits, [
            _State(
                states[index, None, : len(text)],
                [(layer.keys[index, None], layer.values[index, None]) for layer in cache.self_attention_cache.layers],
                [
                    (layer.keys[index, None, :, : len(text)], layer.values[index, None, :, : len(text)])
                    for layer in cache.cross_attention_cache.layers
                ],
            )
            for index, text in enumerate(texts)
        ]

    def go_on(self, state: _State, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptedLM.go_on`."""
        cache, count = self._cache(), len(answers)
        _fill(cache.self_attention_cache, state.decoder, count)
        _fill(cache.cross_attention_cache, state.cross, count)
        cache.is_updated = dict.fromkeys(range(len(state.cross)), True)
        places = [(row, place) for row, answer in enumerate(answers) for place in range(len(answer))]
        states = state.encoder.expand(count, -1, -1)
        return self._decode(states, torch.ones_like(states[..., 0], dtype=torch.long), answers, places, cache)

    def open(self, texts: Sequence[Sequence[int]], shared: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        """See `PromptedLM.open`; the state is the encoder's, its mask, and the decoder's cache."""
        shared = self.shared() if shared is None else shared
        states, mask = self._encoded(texts, shared)
        cache = self._prefixed(shared, len(texts)) if self.soft.is_prefix else self._cache()
        places = [(index, len(self._start) - 1) for index in range(len(texts))]
        return self._decode(states, mask, [self._start] * len(texts), places, cache), (states, mask, cache)

    def step(self, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        """See `PromptedLM.step`."""
        states, mask, cache = state
        rows = [[int(token)] for token in tokens]
        return self._decode(states, mask, rows, [(row, 0) for row in range(len(rows))], cache)

    def _encoded(self, texts: Sequence[Sequence[int]], shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's states [batch_size, sequence_length, hidden_size] and their mask."""
        ids, mask = pad_right(texts)
        mask = mask.to(self.base.device)
        embedded = self.embed(ids, None if self.soft.is_prefix else shared)
        return self.base.get_encoder()(inputs_embeds=embedded, attention_mask=mask).last_hidden_state, mask

    def _decode(
        self,
        states: torch.Tensor,
        mask: torch.Tensor,
        rows: Sequence[Sequence[int]],
        places: Sequence[tuple[int, int]],
        cache: Any,
    ) -> torch.Tensor:
        """Logits at `places` (row, position) of the decoder's `rows`; fills `cache`."""
        from transformers.modeling_outputs import BaseModelOutput

        with self.gathering(places):
            logits: torch.Tensor = self.base(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                decoder_input_ids=pad_right(rows)[0].to(self.base.device),
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits
        return logits

    def _prefixed(self, prefix: torch.Tensor, count: int) -> Any:
        """A cache of `count` rows that the decoder's prefix stands in."""
        cache = self._cache()
        _fill(cache.self_attention_cache, [(layer[0][None], layer[1][None]) for layer in prefix], count)
        return cache

    def _cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        # Without the config: it may count the encoder's layers.
        return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _fill(cache: Any, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int) -> None:
    """Put the same keys and values into `count` rows of an empty cache."""
    for layer, (key, value) in enumerate(layers):
        cache.update(key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1), layer)
