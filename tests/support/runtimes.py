"""Options of the tests' runtimes, and a runtime with a prompt that classifies and one that generates."""

from __future__ import annotations

from pathlib import Path

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
