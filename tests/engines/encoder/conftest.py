"""A runtime that the encoder's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeprompt
from tests.support.encoder_prompts import add_all
from tests.support.runtimes import QUIET


@pytest.fixture(scope="module")
def minilm(minilm_package: Path) -> Iterator[edgeprompt.Runtime]:
    """all-MiniLM-L6-v2 with the prompts of `add_all`; each module has its own."""
    with edgeprompt.load(minilm_package, options=QUIET) as runtime:
        add_all(runtime)
        yield runtime
