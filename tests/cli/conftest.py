"""A command line under test, and prompts for the tiny package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgeprompt import PromptFile, save_prompt
from edgeprompt.package.folder import open_package
from edgeprompt.prompts.template import Template


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """`cli("run", ...)` in this process; exceptions that are bugs are raised."""
    from edgeprompt.cli import main

    def invoke(*args: Any, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture(scope="session")
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """`refused("run", ...)`: the one error line of a command that must fail with exit code 1 and print nothing else."""

    def invoke(*args: Any, stdin: str | None = None) -> str:
        result = cli(*args, stdin=stdin)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return invoke


@pytest.fixture(scope="session")
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """`spawn("export", ...)`: the command as a process of its own; `before` is Python to run first."""

    def start(*args: Any, before: str = "pass", **options: Any) -> subprocess.Popen[str]:
        # A process that a script started in the background ignores Ctrl-C, and so do its children: not these.
        interrupt = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{interrupt}\n{before}\nfrom edgeprompt.cli import main; main()"
        command = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            **options,
        )

    return start


@pytest.fixture(scope="session")
def make_prompt(tiny_llama_package: Path) -> Callable[..., PromptFile]:
    """`make_prompt(name, **fields)`: a random prompt for the tiny package; a classifier unless told otherwise."""
    manifest = open_package(tiny_llama_package).manifest

    def make(name: str, **fields: Any) -> PromptFile:
        rows = np.random.default_rng(len(name)).normal(size=(4, manifest.geometry.hidden_size)).astype(np.float32)
        usual = {
            "method": "prompt-tuning",
            "task": "classify",
            "base": manifest.base,
            "template": Template.parse("{prompt}{text}\nSentiment:"),
            "prompt_embeddings": rows,
            "verbalizer": {"negative": (" bad",), "positive": (" good",)},
            "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        }
        return PromptFile(name, **{**usual, **fields})

    return make


@pytest.fixture(scope="session")
def prompt_folder(make_prompt: Callable[..., PromptFile], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sentiment.safetensors (classify), topic.safetensors (classify), story.safetensors (generate)."""
    folder = tmp_path_factory.mktemp("prompts")
    topics = {"movie": (" movie",), "news": (" news",)}
    for prompt in (
        make_prompt("sentiment"),
        make_prompt("topic", template=Template.parse("{prompt}{text}\nTopic:"), verbalizer=topics),
        make_prompt("story", task="generate", template=Template.parse("{prompt}{text}"), verbalizer={}),
    ):
        save_prompt(prompt, folder / f"{prompt.name}.safetensors")
    return folder
