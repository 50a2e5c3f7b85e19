"""Prompts and texts as keys and values: computed on the graph that serves them, and resident within one budget.

What a request needs is a sequence of parts: its prompt's prefix, then blocks of its text. A block's name covers all
that stands in front of it, so requests share a beginning, whichever of them computed it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.engines.decoder.graph import BLOCK, DecoderGraph
from edgeprompt.errors import UnsupportedError
from edgeprompt.ort.kv_cache import KV, KVShape, PrefixCache
from edgeprompt.ort.prefix_store import PrefixStore
from edgeprompt.prompts.registry import LoadedPrompt


class Prefixes:
    """What decoders derive from prompts. `find` is for the thread that owns the graph it gets."""

    def __init__(
        self, cache: PrefixCache, shape: KVShape, vocab_size: int, store: PrefixStore | None, *, texts: bool
    ) -> None:
        """`texts`: whether blocks of texts are kept as well."""
        self.cache, self._shape, self._vocab, self._store, self._texts = cache, shape, vocab_size, store, texts

    def has_room(self, prompt: LoadedPrompt) -> bool:
        """Whether its keys and values fit beside those that are resident."""
        return self.cache.has_room(prompt.num_virtual_tokens * self._shape.bytes_per_position)

    def find(self, prompt: LoadedPrompt, graph: DecoderGraph, slot: int, total: int) -> KV:
        """A prompt's keys and values [2 * num_layers, heads, positions, head_size].

        Args:
            prompt: one that stands in front of the text.
            graph: computes them where they are not resident.
            slot: a free one of the graph.
            total: positions to reserve there.
        """
        return self.cache.derive(prompt, names.PAST_KEY_VALUES, lambda: self._make(prompt, graph, slot, total))

    def names(self, prefix: LoadedPrompt | None, table: LoadedPrompt | None, ids: Sequence[int]) -> list[bytes]:
        """Names of a text's blocks, of which each covers all that stands in front; none where texts are not kept.

        Args:
            prefix: the prompt whose keys and values stand in front of the text.
            table: the prompt whose rows, or keys and values, virtual ids among `ids` index.
            ids: the text's.
        """
        if not self._texts or not self.cache.budget:
            return []
        name = b"" if prefix is None else prefix.sha256.encode()
        tag = b"" if table is None else table.sha256.encode()
        array, found = np.asarray(ids, np.int64), list[bytes]()
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            block = array[start : start + BLOCK]
            own = tag if (block >= self._vocab).any() else b""
            name = hashlib.blake2b(name + own + block.tobytes(), digest_size=20).digest()
            found.append(name)
        return found

    def keep(
        self, names: Sequence[bytes], count: int, graph: DecoderGraph, slot: int, start: int, owner: LoadedPrompt | None
    ) -> None:
        """Keep the last `count` blocks of `names`, which the graph has computed.

        Args:
            names: of the text's blocks so far.
            count: of those that are new.
            graph: has them.
            slot: where.
            start: where in the slot the first of the new blocks begins.
            owner: the prompt that they depend on.
        """
        if not count or not names:
            return
        found = graph.read(slot, start, start + count * BLOCK)
        if found is None:
            return
        blocks = [found] if count == 1 else [np.ascontiguousarray(part) for part in np.split(found, count, axis=2)]
        self.cache.put_blocks(names, blocks, owner)
        graph.name(slot, [(name, BLOCK) for name in names[len(names) - count :]], start)

    def rows(self, prompt: LoadedPrompt) -> npt.NDArray[np.float32]:
        """A prompt's rows, float32 [num_virtual_tokens, hidden_size]."""
        found = self.cache.derive(
            prompt,
            names.PROMPT_EMBEDDINGS,
            lambda: np.ascontiguousarray(prompt.tensors().prompt_embeddings, np.float32),
        )
        return found.astype(np.float32, copy=False)

    def infix(self, prompt: LoadedPrompt) -> KV:
        """The keys and values of a prompt that has them inside its text."""

        def make() -> KV:
            past = prompt.tensors().past_key_values
            assert past is not None
            return self._shape.prefix(past)

        return self.cache.derive(prompt, names.PAST_KEY_VALUES, make)

    def _make(self, prompt: LoadedPrompt, graph: DecoderGraph, slot: int, total: int) -> KV:
        size = self._shape
        found = None
        if self._store is not None:
            shape = (2 * size.num_layers, size.num_heads, prompt.num_virtual_tokens, size.head_size)
            found = self._store.read(prompt.sha256, shape)
        if found is None:
            found = self.compute(prompt, graph, slot, total)
            if self._store is not None:
                self._store.write(prompt.sha256, found)
        return found

    def compute(self, prompt: LoadedPrompt, graph: DecoderGraph, slot: int, total: int) -> KV:
        """The keys and values, neither looked up nor kept."""
        tensors, count = prompt.tensors(), prompt.num_virtual_tokens
        if tensors.past_key_values is not None:
            return self._shape.prefix(tensors.past_key_values)
        graph.place(slot, (), max(total, count), slot)
        ids = range(self._vocab, self._vocab + count)
        rows = np.asarray(tensors.prompt_embeddings, np.float32)
        for done in range(0, count, graph.chunk):
            graph.prefill(slot, ids[done : done + graph.chunk], done, rows)
        computed = graph.read(slot, 0, count)
        if computed is None:
            raise UnsupportedError(
                f"prompt {prompt.name!r} has {count} virtual tokens, and the graph's attention keeps fewer"
            )
        return computed
