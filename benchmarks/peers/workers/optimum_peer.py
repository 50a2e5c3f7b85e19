"""Optimum's ORTModel, fp32, exported by Optimum itself. It takes token ids only: a hard prompt stands in."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def prepare(work: dict, variant: str) -> None:
    """Export once."""
    folder = Path(work["folder"]) / "optimum"
    if not folder.exists():
        scratch = folder.with_name("optimum.partial")
        ORTModelForCausalLM.from_pretrained(work["hf"], export=True).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(work["hf"]).save_pretrained(scratch)
        scratch.replace(folder)


class Peer:
    """See `worker.py`."""

    batches = (1, 4, 16)

    def __init__(self, work: dict, variant: str) -> None:
        torch.set_num_threads(work["threads"])
        torch.set_grad_enabled(False)
        self._work = work
        options = SessionOptions()
        options.intra_op_num_threads = work["threads"]
        folder = Path(work["folder"]) / "optimum"
        self._model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._prefix_ids = torch.tensor([work["prompt"]["ids"]])
        self._prefix = self._run(self._prefix_ids, None).past_key_values

    def _run(self, ids: torch.Tensor, past: object) -> object:
        length = ids.shape[1] + (past[0][0].shape[2] if past is not None else 0)
        mask = torch.ones((ids.shape[0], length), dtype=torch.long)
        return self._model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)

    def _tokens(self, text: str) -> torch.Tensor:
        return self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def first(self, text: str, *, cached: bool) -> int:
        """Text to first token."""
        ids = self._tokens(text)
        if cached:
            return int(self._run(ids, self._prefix).logits[0, -1].argmax())
        return int(self._run(torch.cat([self._prefix_ids, ids], 1), None).logits[0, -1].argmax())

    def generate(self, text: str, count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, to the last, and the tokens."""
        started = time.perf_counter()
        ids, past, first = self._tokens(text), self._prefix, 0.0
        found: list[int] = []
        while len(found) < count:
            result = self._run(ids, past)
            past = result.past_key_values
            ids = result.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(ids))
            first = first or time.perf_counter() - started
        return first, time.perf_counter() - started, found

    def classify(self, texts: list[str], batch: int) -> list[int]:
        """Label index of each text; texts of like length share a batch."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        labels = torch.tensor(self._work["labels"])
        found = [0] * len(texts)
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            ids = [self._tokens(texts[index])[0] for index in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # causal: what stands behind is not seen
            past = tuple(
                tuple(part.expand(len(chosen), -1, -1, -1).contiguous() for part in layer) for layer in self._prefix
            )
            logits = self._run(padded, past).logits
            last = torch.tensor([len(row) - 1 for row in ids])
            chosen_logits = logits[torch.arange(len(chosen)), last][:, labels]
            for index, label in zip(chosen, chosen_logits.argmax(-1).tolist(), strict=True):
                found[index] = label
        return found
