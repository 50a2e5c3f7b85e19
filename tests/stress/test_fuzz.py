"""A short run of every fuzzing target; EDGEPROMPT_FUZZ is how many inputs each gets (default 60)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stress.fuzz import run
from tests.stress.fuzz_targets import Targets

NAMES = ("prompt_file", "prompt_bytes", "manifest", "template", "text", "sampler", "requests", "scheduler")
INPUTS = int(os.environ.get("EDGEPROMPT_FUZZ", "60"))


@pytest.fixture(scope="module")
def targets(tiny_llama_package: Path) -> Iterator[Targets]:
    found = Targets(tiny_llama_package)
    yield found
    found.close()


def test_every_target_is_here(targets: Targets) -> None:
    assert targets.names == NAMES


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_an_input_is_answered_or_refused(targets: Targets, name: str) -> None:
    found = run(targets, name, INPUTS, stop_at_fault=True)
    assert found["inputs"] >= INPUTS
    assert found["taken"] > 0
