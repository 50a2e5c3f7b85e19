"""A frozen decoder with a soft prompt: logits behind each text, and nothing more."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from edgeprompt.errors import InputError
from edgeprompt.tuning.prompted import PromptedLM, pad_right
from edgeprompt.tuning.soft_prompt import SoftPrompt

KeysValues: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [1, num_key_value_heads, num_virtual_tokens, head_size] of every layer."""
_USUAL_LENGTH = 32
"""Position at which the keys and values of an infix start: about where short texts end."""


class CausalPrompt(PromptedLM):
    """A causal language model with a soft prompt.

    A prompt in front of the text is the same for all rows, and causal attention makes its keys and values independent
    of them: they are computed once for a batch. Rows are padded on the right, so that positions and masks are the
    plain ones.

    Keys and values inside the text (an infix) are read by what stands behind them alone. So the text in front runs
    without gradients; it is padded on the left, so that attention with a window counts true distances.
    """

    def __init__(self, base: Any, soft: SoftPrompt, *, vocab_size: int, prompt_leads: bool) -> None:
        """`base`: transformers causal LM; `prompt_leads`: whether all virtual tokens stand in front."""
        super().__init__(base, soft, vocab_size=vocab_size)
        self._leads = prompt_leads
        self._is_infix = soft.is_prefix and not prompt_leads
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def shared(self) -> KeysValues:
        """What stands before every row, as keys and values; empty where the prompt stands inside the text."""
        made = self.soft().to(self.base.dtype)
        if self.soft.is_prefix:
            return [(layer[0][None], layer[1][None]) for layer in made]
        return self.keys_values(made) if self._leads else []

    def keys_values(self, embeddings: torch.Tensor, start: int = 0) -> KeysValues:
        """Keys and values of `embeddings` [count, hidden_size] at positions `start`, `start` + 1, ..."""
        cache = self._cache()
        positions = torch.arange(start, start + len(embeddings), device=self.base.device)[None]
        at = self._at(positions) if start else {}
        self.base.base_model(inputs_embeds=embeddings[None], past_key_values=cache, use_cache=True, **at)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def start_prefix(self, ids: Sequence[int]) -> torch.Tensor:
        """The keys and values of a text, as a prefix to start from."""
        embedded = self.base.get_input_embeddings()(torch.tensor(list(ids), device=self.base.device))
        most = getattr(self.base.config, "max_position_embeddings", None) or _USUAL_LENGTH + len(embedded)
        start = max(0, min(_USUAL_LENGTH, most - len(embedded))) if self._is_infix else 0
        made = self.keys_values(embedded, start)
        return torch.stack([torch.stack([key[0], value[0]]) for key, value in made])

    def logits(
        self,
        texts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        shared: KeysValues | None = None,
    ) -> torch.Tensor:
        """See `PromptedLM.logits`; `shared` is `self.shared()`."""
        shared = self.shared() if shared is None else shared
        skipped = self._skipped(shared)
        rows: list[list[int]] = []
        places: list[tuple[int, int]] = []
        for text, several in zip(texts, answers, strict=True):
            for answer in several:
                last = len(text) - skipped - 1
                places += [(len(rows), last + offset) for offset in range(len(answer) + 1)]
                rows.append([*text[skipped:], *answer])
        if self._is_infix:
            return self._run_around(rows, places, shared)[0]
        return self._run(rows, places, shared, self._cache() if shared else None)

    def begin(
        self, texts: Sequence[Sequence[int]], shared: KeysValues | None = None
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """See `PromptedLM.begin`; a state is the keys and values of the prompt and the text, padding cut off."""
        from transformers import DynamicCache

        shared = self.shared() if shared is None else shared
        if self._is_infix:
            return self._run_around(texts, [(index, len(text) - 1) for index, text in enumerate(texts)], shared)
        skipped = self._skipped(shared)
        rows = [list(text[skipped:]) for text in texts]
        cache = DynamicCache()  # without the config: a sliding window must not cut what padding has pushed out of it
        logits = self._run(rows, [(index, len(row) - 1) for index, row in enumerate(rows)], shared, cache)
        before = self.soft.num_virtual_tokens if shared else 0
        ends = [before + len(row) for row in rows]
        return logits, [
            [(layer.keys[index, None, :, :end], layer.values[index, None, :, :end]) for layer in cache.layers]
            for index, end in enumerate(ends)
        ]

    def go_on(self, state: KeysValues, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptedLM.go_on`."""
        from transformers import DynamicCache

        places = [(row, place) for row, answer in enumerate(answers) for place in range(len(answer))]
        return self._run(answers, places, state, DynamicCache())

    def open(self, texts: Sequence[Sequence[int]], shared: KeysValues | None = None) -> tuple[torch.Tensor, Any]:
        """See `PromptedLM.open`; the state is the batch's cache."""
        from transformers import DynamicCache

        shared = self.shared() if shared is None else shared
        cache = DynamicCache()
        if self._is_infix:
            logits, states = self.begin(texts, shared)
            for layer, rows_of in enumerate(zip(*states, strict=True)):
                keys, values = zip(*rows_of, strict=True)
                cache.update(torch.cat(keys), torch.cat(values), layer)
            return logits, cache
        skipped = self._skipped(shared)
        rows = [list(text[skipped:]) for text in texts]
        return self._run(rows, [(index, len(row) - 1) for index, row in enumerate(rows)], shared, cache), cache

    def step(self, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        """See `PromptedLM.step`."""
        mask = torch.ones(len(tokens), state.get_seq_length() + 1, dtype=torch.long, device=self.base.device)
        with self.gathering([(row, 0) for row in range(len(tokens))]):
            logits: torch.Tensor = self.base(
                input_ids=tokens[:, None].to(self.base.device),
                attention_mask=mask,
                past_key_values=state,
                use_cache=True,
            ).logits
        return logits

    def _skipped(self, shared: KeysValues) -> int:
        """How many virtual ids at the start of a text `shared` stands for."""
        return 0 if self.soft.is_prefix or not shared else self.soft.num_virtual_tokens

    def _run(
        self, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], before: KeysValues, cache: Any
    ) -> torch.Tensor:
        """Logits at `places` (row, position) of `rows` behind `before`, which all rows share; fills `cache`."""
        ids, mask = pad_right(rows, before[0][0].shape[2] if before else 0)
        inputs: dict[str, Any] = {"attention_mask": mask.to(self.base.device), "past_key_values": cache}
        if before:
            for layer, (key, value) in enumerate(before):
                cache.update(key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1), layer)
            inputs["input_ids"] = ids.to(self.base.device)
        else:
            inputs["inputs_embeds"] = self.embed(ids, self.soft())
        with self.gathering(places):
            logits: torch.Tensor = self.base(**inputs, use_cache=cache is not None).logits
        return logits

    def _run_around(
        self, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], infix: KeysValues
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """Logits at `places` (row, position) of `rows`, in which virtual ids stand where the infix does.

        Returns:
            The logits, and keys and values of each row, padding cut off.
        """
        from transformers import DynamicCache

        cache, device, count = DynamicCache(), self.base.device, self.soft.num_virtual_tokens
        starts = [next(place for place, token in enumerate(row) if token >= self.vocab_size) for row in rows]
        longest, pads = max(starts), [max(starts) - start for start in starts]
        reversed_ids, reversed_mask = pad_right([row[:start][::-1] for row, start in zip(rows, starts, strict=True)])
        ids, mask = reversed_ids.flip(1).to(device), reversed_mask.flip(1).to(device)
        if longest:
            with torch.no_grad():
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                self.base.base_model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **self._at(positions)
                )
        for layer, (key, value) in enumerate(infix):
            cache.update(key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1), layer)
        behind = [row[start + count :] for row, start in zip(rows, starts, strict=True)]
        if not all(behind):
            raise InputError(
                "a text has no token behind {prompt}, so nothing reads the keys and values; end the template "
                "in text that the tokenizer keeps"
            )
        ids, rest = pad_right(behind, count)
        first = torch.tensor(starts, device=device)[:, None] + count
        with self.gathering([(row, place - starts[row] - count) for row, place in places]):
            logits: torch.Tensor = self.base(
                input_ids=ids.to(device),
                attention_mask=torch.cat([mask, rest.to(device)], dim=1),
                past_key_values=cache,
                use_cache=True,
                **self._at(first + torch.arange(ids.shape[1], device=device)),
            ).logits
        ends = [longest + count + len(row) for row in behind]
        return logits, [
            [(layer.keys[row, None, :, pad:end], layer.values[row, None, :, pad:end]) for layer in cache.layers]
            for row, (pad, end) in enumerate(zip(pads, ends, strict=True))
        ]

    def _at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions as the base takes them; a base that takes none counts the mask, or distances alone (ALiBi)."""
        return {"position_ids": positions} if self._takes_positions else {}

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.base.config)
