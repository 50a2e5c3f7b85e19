"""edgeprompt, through its public runtime."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package, open_package

if TYPE_CHECKING:
    from edgeprompt.runtime import Runtime


def prepare(work: dict, variant: str) -> None:
    """Pack the weights for this processor once, as every later start finds them."""
    Peer(work, variant).close()


class Peer:
    """See `worker.py`."""

    batches = (1, 64, 256)

    def __init__(self, work: dict, variant: str) -> None:
        folder = Path(work["folder"])
        package = open_package(folder / variant)
        tokens = dataclasses.replace(package.manifest.tokens, eos=())  # all generate the same number of tokens
        self._package = Package(package.path, dataclasses.replace(package.manifest, tokens=tokens))
        self._folder, self._prompts = folder, Path(work["prompt"]["folder"])
        self._suffix, self._threads = work["suffix"], work["threads"]
        self._runtime = self._open()
        self._fresh: Runtime | None = None
        self._wide: Runtime | None = None

    def _open(self, prefix_budget: int | None = None, *, workers: int | None = None) -> Runtime:
        options = EngineOptions(
            allow_other_weights=True,
            provider="cpu",
            threads=None if workers else self._threads,
            workers=workers,
            prefix_budget=prefix_budget,
            reuse_texts=False,  # the same texts are measured again and again
            # The folder keeps prefixes too: a prompt that is to be run again must not be found there.
            cache_folder=self._folder / "packed" if prefix_budget is None else None,
        )
        sessions = Sessions(self._package, options)
        from edgeprompt.runtime import Runtime  # beside the sessions, as `edgeprompt.load` does

        runtime = Runtime(self._package, options, sessions)
        for name in ("sentiment", "plain"):
            runtime.add_prompt(self._prompts / f"{name}.safetensors")
        return runtime

    def close(self) -> None:
        """End the threads."""
        for runtime in (self._runtime, self._fresh, self._wide):
            if runtime is not None:
                runtime.close()

    def first(self, text: str, *, cached: bool) -> int:
        """Text to first token."""
        if not cached and self._fresh is None:
            self._fresh = self._open(0)
        runtime = self._runtime if cached else self._fresh
        return runtime.generate(text, prompt="plain", max_new_tokens=1, temperature=0).token_ids[0]

    def generate(self, text: str, count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, to the last, and the tokens."""
        started = time.perf_counter()
        found = self._runtime.generate(text, prompt="plain", max_new_tokens=count, temperature=0)
        total = time.perf_counter() - started
        return found.timings.ttft, total, list(found.token_ids)

    def classify(self, texts: list[str], batch: int) -> list[int]:
        """Label index of each text; a batch goes through workers."""
        if batch > 1 and self._wide is None:
            self._wide = self._open(workers=self._threads)
        runtime = self._wide if batch > 1 else self._runtime
        from edgeprompt import GenerationOptions, Request

        options = GenerationOptions()
        requests = [Request(text.removesuffix(self._suffix), "sentiment", options=options) for text in texts]
        found: list[int] = []
        for at in range(0, len(requests), batch):
            answers = runtime.run(requests[at : at + batch])
            found += [("negative", "positive").index(answer.label) for answer in answers]
        return found
