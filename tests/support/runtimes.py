"""Options of the tests' runtimes, one with a prompt that classifies and one that generates, and a way to hold it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt import EngineOptions, Runtime
from tests.support.prompts import make_prompt

QUIET = EngineOptions(provider="cpu", threads=1, spinning=False)
WORDS = {"x": (" good",), "y": (" bad",)}


def load_with_prompts(package: Path) -> Runtime:
    """A decoder with the prompts "words", which chooses between `WORDS`, and "story"."""
    runtime = edgeprompt.load(package, options=QUIET)
    runtime.add_prompt(make_prompt(runtime.manifest, "words", verbalizer=WORDS))
    runtime.add_prompt(make_prompt(runtime.manifest, "story", seed=1))
    return runtime


def hold(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Steps of a runtime wait for the second event; the first says that one has begun. The graph is the real one."""
    engine: Any = runtime._engine
    begun, go = threading.Event(), threading.Event()
    match runtime.manifest.architecture:
        case "decoder-only":
            owner, name = engine._lanes[0].graph, "decode"
        case "encoder-only":
            owner, name = type(engine._graph), "run"
        case _:
            owner, name = engine._graphs, "step"
    real = getattr(owner, name)

    def step(*given: Any) -> Any:
        begun.set()
        go.wait(20)
        return real(*given)

    monkeypatch.setattr(owner, name, step)
    return begun, go
