"""Limits and settings of one runtime. Imports nothing heavy: sessions begin to open before numpy's users are there."""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass

from edgeprompt.errors import InputError


@dataclass(frozen=True)
class EngineOptions:
    """Limits and settings of one runtime. Sizes are in bytes. None takes a default that fits the package."""

    provider: str = "auto"
    threads: int | None = None
    """Of one run. None: one per physical core; on the CPU fewer of them while other programs keep cores busy."""
    workers: int | None = None
    """Sequences that are computed side by side, each on one thread, instead of one on `threads` threads. Each takes
    longer, and more are computed per second. Workers share the weights."""
    spinning: bool = True
    """Whether idle threads spin between operators (faster answers, busier cores)."""
    prefix_budget: int | None = None
    """Most bytes of what is kept of prompts and texts (keys and values, prompt embeddings). None: 64 MiB, on encoders
    128 MiB."""
    reuse_texts: bool = True
    """Keep what was computed of texts, within `prefix_budget`, for requests that begin alike. False computes every text
    anew, as measurements of speed need it."""
    kv_budget: int | None = None
    """Most bytes of KV cache for running requests."""
    max_batch: int = 16
    """Most sequences in one decode step; those of one request's label words are not counted."""
    max_queue: int = 1024
    """Most waiting requests."""
    batch_invariant: bool = False
    """Give generations of a quantised decoder the same tokens alone and batched. A single generation becomes slower."""
    drafts: bool = False
    """Decoders on the CPU: read tokens that the text may repeat out of it and check several in one step, where a
    generation runs alone. Answers that copy, restore or quote become faster, others a little slower. Quantised packages
    then choose otherwise at near ties, because kernels for several positions round otherwise than those for one."""
    allow_other_weights: bool = False
    """Serve prompts that were tuned for other weights, where these or the package's are far from the base."""
    cache_folder: str | os.PathLike[str] | None = None
    """Folder that keeps prefix KV and the graph packed for this processor; None keeps nothing."""

    lanes: InitVar[int | None] = None
    """The old name of `workers`."""

    def __post_init__(self, lanes: int | None) -> None:
        """Reject limits under which nothing could run.

        Raises:
            InputError: names the limit.
        """
        if lanes is not None:
            if self.workers is not None:
                raise InputError("give workers alone; lanes is its old name")
            object.__setattr__(self, "workers", lanes)
        limits = (("max_batch", 1), ("max_queue", 1), ("prefix_budget", 0), ("kv_budget", 1), ("workers", 1))
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise InputError(f"{name} is {value}; it must be an integer of at least {least}")
        if self.drafts and self.batch_invariant:
            raise InputError(
                "drafts and batch_invariant cannot both be on: checking a draft takes other kernels than a batch"
            )
        if self.workers is not None and self.threads is not None:
            raise InputError(f"threads is {self.threads} and workers {self.workers}; give one, a worker has one thread")
