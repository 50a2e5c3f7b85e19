"""CONTRIBUTING lists the modules that a request visits on its way to the session; here real requests are followed."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import edgeprompt
from edgeprompt import PromptFile, Runtime
from tests.support.encoder_prompts import with_head
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS

ROOT = Path(__file__).resolve().parent.parent
MOST = 12
"""Modules that a request may visit."""


def modules_visited(package: Path, prompt: Callable[[Runtime], PromptFile]) -> list[str]:
    """Modules whose functions run for one `classify`, in any thread, up to the session's run, in order."""
    visited: list[str] = []
    following = False

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal following
        if following and event == "call":
            path = Path(frame.f_code.co_filename)
            name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT / "edgeprompt") else ""
            if name and name not in visited:
                visited.append(name)
            following = frame.f_code.co_name not in ("run", "run_with_iobinding") or "onnxruntime" not in path.parts

    threading.setprofile(profile)  # for the scheduler's thread, which starts at load
    try:
        with edgeprompt.load(package, options=QUIET) as runtime:
            runtime.add_prompt(prompt(runtime), name="x")
            runtime.classify("a text", prompt="x")  # imports and caches are there
            sys.setprofile(profile)
            following = True
            runtime.classify("another text", prompt="x")
            following = False
            sys.setprofile(None)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return visited


def listed(architecture: str) -> list[str]:
    """The modules that CONTRIBUTING lists for an architecture, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## The way of a request")[1].split("\n## ")[0]
    (part,) = re.findall(rf"^### {architecture}\n(.*?)(?=^### |\Z)", section, re.DOTALL | re.MULTILINE)
    return re.findall(r"^\d+\. `(edgeprompt/[\w/]+\.py)`", part, re.MULTILINE)


def _words(runtime: Runtime) -> PromptFile:
    return make_prompt(runtime.manifest, "x", verbalizer=WORDS)


def _head(runtime: Runtime) -> PromptFile:
    return with_head(runtime, "x", 2)


def check(architecture: str, visited: list[str]) -> None:
    names = listed(architecture)
    assert sorted(visited) == sorted(names), "\n".join(visited)
    assert len(names) <= MOST


def test_decoder(tiny_llama_package: Path) -> None:
    check("Decoder", modules_visited(tiny_llama_package, _words))


def test_encoder(encoder_package: Callable[..., Path]) -> None:
    check("Encoder", modules_visited(encoder_package("BERT"), _head))


def test_encoder_decoder(seq2seq_package: Callable[..., Path]) -> None:
    check("Encoder-decoder", modules_visited(seq2seq_package("T5"), _words))
