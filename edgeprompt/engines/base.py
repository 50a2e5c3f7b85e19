"""One engine per architecture; the runtime picks by the manifest's `architecture`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.request import Request, Result

T = TypeVar("T")

_ENGINES = {
    names.DECODER_ONLY: ("edgeprompt.engines.decoder.engine", "DecoderEngine"),
    names.ENCODER_ONLY: ("edgeprompt.engines.encoder.engine", "EncoderEngine"),
    names.ENCODER_DECODER: ("edgeprompt.engines.seq2seq.engine", "Seq2SeqEngine"),
}


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


def side_by_side(lanes: int | None, function: Callable[[T], object], items: Sequence[T]) -> None:
    """Call `function` with every item, on as many threads as there are lanes; the first error is raised."""
    if lanes is None or lanes == 1 or len(items) < 2:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(lanes, "edgeprompt-lane") as pool:
        for _ in pool.map(function, items):
            pass


def create_engine(package: Package, options: EngineOptions, sessions: Sessions) -> Engine:
    """The engine for a package, whose sessions may still be opening."""
    module, name = _ENGINES[package.manifest.architecture]
    make = getattr(import_module(module), name)
    sessions.give_head_start()
    _ = package.tokenizer  # read here, beside the sessions
    engine: Engine = make(package, options, sessions)
    return engine


__all__ = ["Engine", "Result", "create_engine", "side_by_side"]
