"""onnxruntime-genai with its own int4 graph, its sampler, and its rewind to keep the prefix.

Its graph takes token ids only, so a hard prompt of as many tokens stands in for the soft one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


class Peer:
    """See `worker.py`."""

    batches = (1,)

    def __init__(self, work: dict, variant: str) -> None:
        config = og.Config(str(Path(work["folder"]) / variant))
        sessions = {"intra_op_num_threads": work["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        self._prefix = np.asarray(work["prompt"]["ids"], np.int32)
        self._labels = np.asarray(work["labels"])
        parameters = og.GeneratorParams(self._model)
        context = work["context"]
        parameters.set_search_options(do_sample=False, max_length=context, min_length=context - 1, batch_size=1)
        self._generator = og.Generator(self._model, parameters)
        self._generator.append_tokens(self._prefix)

    def first(self, text: str, *, cached: bool) -> int:
        """Text to first token."""
        tokens = self._tokenizer.encode(text)
        if cached:
            self._generator.rewind_to(len(self._prefix))
        else:
            self._generator.rewind_to(0)
            tokens = np.concatenate([self._prefix, tokens])
        self._generator.append_tokens(tokens)
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def generate(self, text: str, count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, to the last, and the tokens."""
        started = time.perf_counter()
        found = [self.first(text, cached=True)]
        first = time.perf_counter() - started
        while len(found) < count:
            self._generator.generate_next_token()
            found.append(int(self._generator.get_next_tokens()[0]))
        return first, time.perf_counter() - started, found

    def classify(self, texts: list[str], batch: int) -> list[int]:
        """Label index of each text, one after another (rewinding is for single sequences)."""
        found = []
        for text in texts:
            self._generator.rewind_to(len(self._prefix))
            self._generator.append_tokens(self._tokenizer.encode(text))
            logits = np.asarray(self._generator.get_logits()).reshape(-1)[-self._vocab() :]
            found.append(int(logits[self._labels].argmax()))
        return found

    def _vocab(self) -> int:
        return int(np.asarray(self._generator.get_logits()).shape[-1])
