"""Servers over tiny packages of all three architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edgeprompt
from edgeprompt import names
from tests.support.encoder_prompts import add_all
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS, load_with_prompts
from tests.support.server import Running, serving

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="session")
def decoder(tiny_llama_package: Path) -> Iterator[Running]:
    """A random Llama with the prompts "words" and "story"."""
    with load_with_prompts(tiny_llama_package) as runtime, serving(runtime) as running:
        yield running


@pytest.fixture(scope="session")
def encoder(encoder_package: Callable[..., Path]) -> Iterator[Running]:
    """A random BERT with the prompts of `add_all`."""
    with edgeprompt.load(encoder_package("BERT"), options=QUIET) as runtime:
        add_all(runtime)
        with serving(runtime) as running:
            yield running


@pytest.fixture(scope="session")
def seq2seq(seq2seq_package: Callable[..., Path]) -> Iterator[Running]:
    """A random T5 with the prompts "words" and "story"."""
    with edgeprompt.load(seq2seq_package("T5"), options=QUIET) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "words", verbalizer=WORDS))
        runtime.add_prompt(make_prompt(runtime.manifest, "story", seed=1))
        with serving(runtime) as running:
            yield running


@pytest.fixture(scope="session")
def chatting(tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The random Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "package"
    folder.mkdir()
    for file in tiny_llama_package.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / names.CHAT_TEMPLATE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    with edgeprompt.load(folder, options=QUIET) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "words", verbalizer=WORDS))
        runtime.add_prompt(make_prompt(runtime.manifest, "story", seed=1))
        with serving(runtime) as running:
            yield running
