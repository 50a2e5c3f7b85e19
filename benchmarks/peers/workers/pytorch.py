"""PEFT on PyTorch. The soft prompt's keys and values are kept, which PEFT itself does not do: its best case.

Without cache it is `PeftModel` as it comes; with cache its base runs on the kept prefix.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class Peer:
    """See `worker.py`."""

    batches = (1, 4, 16, 32)

    def __init__(self, work: dict, variant: str) -> None:
        torch.set_num_threads(work["threads"])
        torch.set_grad_enabled(False)
        self._work = work
        self._model = AutoModelForCausalLM.from_pretrained(work["hf"], dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(work["hf"])
        rows = np.load(Path(work["prompt"]["folder"]) / "rows.npy")
        self._rows = torch.from_numpy(rows)
        self._prefix = self._model.model(inputs_embeds=self._rows[None], use_cache=True).past_key_values
        self._peft = None

    def _tokens(self, text: str) -> torch.Tensor:
        return self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def _cache(self, rows: int = 1) -> DynamicCache:
        cache = DynamicCache()
        for index, layer in enumerate(self._prefix.layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
        return cache

    def _with_peft(self) -> torch.nn.Module:
        if self._peft is None:
            from peft import PromptTuningConfig, TaskType, get_peft_model

            config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(self._rows))
            self._peft = get_peft_model(self._model, config).eval()
            self._peft.prompt_encoder["default"].embedding.weight.data = self._rows
        return self._peft

    def first(self, text: str, *, cached: bool) -> int:
        """Text to first token."""
        ids = self._tokens(text)
        if cached:
            logits = self._model(input_ids=ids, past_key_values=self._cache(), logits_to_keep=1).logits
        else:
            logits = self._with_peft()(input_ids=ids, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def generate(self, text: str, count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, to the last, and the tokens."""
        started = time.perf_counter()
        cache = self._cache()
        found: list[int] = []
        ids, first = self._tokens(text), 0.0
        while len(found) < count:
            logits = self._model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(ids))
            first = first or time.perf_counter() - started
        return first, time.perf_counter() - started, found

    def classify(self, texts: list[str], batch: int) -> list[int]:
        """Label index of each text; texts of like length share a batch, and only the last positions get logits."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        labels = torch.tensor(self._work["labels"])
        found = [0] * len(texts)
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            ids = [self._tokens(texts[index])[0] for index in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # causal: what stands behind is not seen
            hidden = self._model.model(input_ids=padded, past_key_values=self._cache(len(chosen))).last_hidden_state
            last = torch.tensor([len(row) - 1 for row in ids])
            logits = self._model.lm_head(hidden[torch.arange(len(chosen)), last])[:, labels]
            for index, label in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                found[index] = label
        return found
