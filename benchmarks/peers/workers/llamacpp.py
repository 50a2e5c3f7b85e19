"""llama.cpp through llama-cpp-python's C interface, which spares it the Python sampling loop.

It has no soft prompts, so a hard prompt of as many tokens stands in; its keys and values stay in the cache.
"""

from __future__ import annotations

import ctypes
import time

import llama_cpp as lib
import numpy as np

CONTEXT = 2048
BATCH = 1024


class Peer:
    """See `worker.py`."""

    batches = (1, 4, 16)

    def __init__(self, work: dict, variant: str) -> None:
        self._work = work
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(work["gguf"].encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, BATCH, 512
        settings.n_threads = settings.n_threads_batch = work["threads"]
        settings.n_seq_max, settings.kv_unified = 1 + max(self.batches), True
        self._context = lib.llama_init_from_model(self._model, settings)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._size = lib.llama_vocab_n_tokens(self._vocab)
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        self._prefix = work["prompt"]["ids"]
        self._warm = False

    def _tokens(self, text: str) -> list[int]:
        data = text.encode()
        room = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(self._vocab, data, len(data), room, len(room), False, False)
        return list(room[:count])

    def _run(self, rows: list[tuple[int, int, list[int]]]) -> list[int]:
        """Decode (sequence, position, tokens) rows in one batch; the places of their last tokens."""
        batch, place, last = self._batch, 0, []
        for sequence, position, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = position + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = offset == len(tokens) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = place
        if lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return last

    def _logits(self, place: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, place), (self._size,))

    def _keep_prefix(self) -> int:
        """Leave the prefix alone in the cache, computing it on first use; its length."""
        if not self._warm:
            self._run([(0, 0, self._prefix)])
            self._warm = True
        lib.llama_memory_seq_rm(self._memory, 0, len(self._prefix), -1)
        return len(self._prefix)

    def _start(self, text: str, *, cached: bool) -> tuple[int, int]:
        tokens, past = self._tokens(text), 0
        if cached:
            past = self._keep_prefix()
        else:
            lib.llama_memory_seq_rm(self._memory, 0, 0, -1)
            tokens, self._warm = [*self._prefix, *tokens], False
        (place,) = self._run([(0, past, tokens)])
        return int(self._logits(place).argmax()), past + len(tokens)

    def first(self, text: str, *, cached: bool) -> int:
        """Text to first token."""
        token, _ = self._start(text, cached=cached)
        self._warm = True
        return token

    def generate(self, text: str, count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, to the last, and the tokens."""
        started = time.perf_counter()
        token, length = self._start(text, cached=True)
        first = time.perf_counter() - started
        found = [token]
        while len(found) < count:
            (place,) = self._run([(0, length, [token])])
            token = int(self._logits(place).argmax())
            found.append(token)
            length += 1
        return first, time.perf_counter() - started, found

    def classify(self, texts: list[str], batch: int) -> list[int]:
        """Label index of each text; `batch` sequences share the prefix's cells and run in one batch."""
        past = self._keep_prefix()
        labels = np.asarray(self._work["labels"])
        for row in range(1, batch + 1 if batch > 1 else 1):
            lib.llama_memory_seq_rm(self._memory, row, -1, -1)
            lib.llama_memory_seq_cp(self._memory, 0, row, 0, past)
        found: list[int] = []
        for at in range(0, len(texts), batch):
            rows = [
                (row + 1 if batch > 1 else 0, past, self._tokens(text))
                for row, text in enumerate(texts[at : at + batch])
            ]
            found += [int(self._logits(place)[labels].argmax()) for place in self._run(rows)]
            for sequence, _, _ in rows:
                lib.llama_memory_seq_rm(self._memory, sequence, past, -1)
        return found
