"""Two versions side by side: the table from known seconds, and one measurement of this checkout."""

from pathlib import Path

import pytest

from benchmarks.ablations.versions import measure, to_markdown
from edgeprompt import load, save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import WORDS

ROOT = Path(__file__).resolve().parents[2]


def test_ratios_are_of_one_round():
    rounds = [
        {"old": {"decode": 0.010}, "new": {"decode": 0.011}},
        {"old": {"decode": 0.020}, "new": {"decode": 0.020}},
    ]
    rounds.append({"old": {"decode": 0.010}, "new": {"decode": 0.0105}})
    machine = {"day": "a day", "cpu": "a processor", "isa": ["AVX2"], "cores": 2, "versions": {"onnxruntime": "1"}}
    text = to_markdown({"machine": machine, "threads": 2, "seconds": {"tiny": rounds}})
    assert "| tiny | a decode step | 10.00 | 11.00 | 1.05 (1.00 to 1.10) |" in text


def test_a_checkout_is_measured(tiny_llama_package: Path, tmp_path: Path):
    with load(tiny_llama_package) as runtime:
        save_prompt(make_prompt(runtime.manifest, "tone", verbalizer=WORDS), tmp_path / "tone.safetensors")
    found = measure(ROOT, tiny_llama_package, tmp_path / "tone.safetensors", 1)
    assert {"start", "classify", "classify_many", "first_token"} <= set(found)
    assert all(seconds > 0 for seconds in found.values())
    with pytest.raises(SystemExit, match="edgeprompt came from"):
        measure(tmp_path, tiny_llama_package, tmp_path / "tone.safetensors", 1)
