"""Eight tasks over the tiny Llama, and records that name them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS

TASKS = 8


@pytest.fixture(scope="session")
def tasks(tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prompts: "task0" to "task7", every second one classifies."""
    folder = tmp_path_factory.mktemp("tasks")
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for index in range(TASKS):
            fields = {"verbalizer": WORDS} if index % 2 else {}
            prompt = make_prompt(runtime.manifest, f"task{index}", seed=index, **fields)
            edgeprompt.save_prompt(prompt, folder / f"task{index}.safetensors")
    return folder


def make_records(count: int, *, padding: int = 0) -> list[dict[str, Any]]:
    """Records of all tasks, mixed; one in 50 has no text, and one in 40 names no prompt."""
    rng = random.Random(1)
    words = ["fine", "dull", "loud", "film", "music", "a story", "so\r", '"good"', "b,ad", "ä€😀"]
    return [
        {
            "id": f"n{i}",
            "task": f"task{rng.randrange(TASKS)}" if i % 40 else "nothing",
            "text": " ".join(rng.choices(words, k=4)) if i % 50 else None,
            "answer": "gold",
            "padding": "x" * padding,
        }
        for i in range(count)
    ]
