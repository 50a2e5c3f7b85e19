"""Every example of docs/runtime.md runs, in order, in a folder as it says."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("sentiment", "source", "restore")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_examples_run(smollm2_package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(smollm2_package)
    Path("prompts").mkdir()
    for name in PROMPTS:
        for folder in (".", "prompts"):
            shutil.copy(ROOT / "examples" / "prompts" / f"{name}.safetensors", folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runtime.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 10
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/runtime.md", "exec"), names)
    assert names["rt"].provider in ("cpu", "cuda")
    assert set(PROMPTS) <= set(names["rt"].prompts)
    assert names["check"].expected
    names["rt"].close()
    assert capsys.readouterr().out
    assert list(Path("prefixes").glob("*.safetensors"))
