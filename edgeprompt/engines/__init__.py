"""One engine per architecture; the runtime picks by the manifest's `architecture`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import InputError
from edgeprompt.graph_cache import GraphCache
from edgeprompt.package import Package
from edgeprompt.prompt_file import PromptFile
from edgeprompt.prompt_source import PromptSource
from edgeprompt.request import Request, Result
from edgeprompt.session import Session, import_onnxruntime, open_session

T = TypeVar("T")

_ENGINES = {
    names.DECODER_ONLY: ("edgeprompt.engines.decoder", "DecoderEngine"),
    names.ENCODER_ONLY: ("edgeprompt.engines.encoder", "EncoderEngine"),
    names.ENCODER_DECODER: ("edgeprompt.engines.seq2seq", "Seq2SeqEngine"),
}


@dataclass(frozen=True)
class EngineOptions:
    """Limits and settings of one runtime; sizes in bytes, None: a default that fits the package."""

    provider: str = "auto"
    threads: int | None = None
    lanes: int | None = None
    """Requests that are computed side by side, each on one thread, instead of one after another on `threads` threads:
    more of them a second, each one slower. They share the weights."""
    spinning: bool = True
    """Whether idle threads spin between operators (faster answers, busier cores)."""
    prefix_budget: int | None = None
    """Most bytes of resident prefix KV."""
    kv_budget: int | None = None
    """Most bytes of KV cache for running requests."""
    max_batch: int = 16
    """Most rows of one decode step."""
    max_queue: int = 1024
    """Most requests waiting."""
    batch_invariant: bool = False
    """Give a quantised decoder's generations the same tokens whatever else runs, at a slower lone generation."""
    cache_folder: str | os.PathLike[str] | None = None
    """Folder that keeps, between starts, prefix KV and the graph as packed for this processor; None keeps nothing."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run.

        Raises:
            InputError: names the limit.
        """
        limits = (("max_batch", 1), ("max_queue", 1), ("prefix_budget", 0), ("kv_budget", 1), ("lanes", 1))
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        if self.lanes is not None and self.threads is not None:
            raise InputError(f"threads is {self.threads} and lanes {self.lanes}; give one, a lane has one thread")


class Engine(Protocol):
    """What the runtime asks of an architecture. Every method may be called from any thread."""

    provider: str

    def add_prompt(self, name: str, prompt: PromptFile | PromptSource) -> None:
        """Make a checked prompt ready under `name`, replacing one of that name."""

    def remove_prompt(self, name: str) -> None:
        """Forget a prompt; requests that already run keep it."""

    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> list[Any]:
        """Answer a batch of mixed tasks, in order; with `return_errors`, a failed row is its exception."""

    def stream(self, request: Request) -> Iterator[str]:
        """Generate piece by piece."""

    def logits(self, request: Request) -> npt.NDArray[np.float32]:
        """float32 [vocab_size]: scores of the next token (first decoder step for encoder-decoders)."""

    def embed(self, requests: Sequence[Request], pooling: str | None) -> npt.NDArray[np.float32]:
        """float32 [len(requests), hidden_size]."""

    def close(self) -> None:
        """Fail what is waiting and free the sessions."""


def open_engine_session(package: Package, key: str, options: EngineOptions) -> Session:
    """A session of the package's graph `key`, as `options` ask for."""
    path, cache = package.graph(key), None
    if options.cache_folder is not None:
        version = import_onnxruntime().__version__
        cache = GraphCache(Path(options.cache_folder), package.manifest.graphs[key], ort_version=version)
    threads = options.threads if options.lanes is None else 1
    import_onnxruntime()  # before the tokenizer's head start begins, which is the session's
    package.read_ahead()
    return open_session(path, provider=options.provider, threads=threads, spinning=options.spinning, cache=cache)


def side_by_side(lanes: int | None, function: Callable[[T], object], items: Sequence[T]) -> None:
    """Call `function` with every item, on as many threads as there are lanes; the first error is raised."""
    if lanes is None or lanes == 1 or len(items) < 2:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(lanes, "edgeprompt-lane") as pool:
        for _ in pool.map(function, items):
            pass


def create_engine(package: Package, options: EngineOptions) -> Engine:
    """The engine for a package."""
    module, name = _ENGINES[package.manifest.architecture]
    engine: Engine = getattr(import_module(module), name)(package, options)
    return engine


__all__ = ["Engine", "EngineOptions", "Result", "create_engine", "open_engine_session", "side_by_side"]
