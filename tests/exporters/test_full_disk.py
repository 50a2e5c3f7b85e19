"""Files that libraries write, on a full disk: an error, and what lay there before stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from edgeprompt import EdgePromptError, load_prompt
from exporters.quantize.store import Store
from exporters.writers import write_npy, write_onnx_adapter

kind, folder = sys.argv[1], Path(sys.argv[2])
prompt = load_prompt(folder / "p.safetensors")
target = folder / f"x.{kind}"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = 66_000 if kind == "store" else target.stat().st_size - 100
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a write beyond that fails as on a full disk
try:
    if kind == "store":
        Store(folder).put("x", np.ones(66_100, np.uint8))
    else:
        (write_npy if kind == "npy" else write_onnx_adapter)(prompt, target, force=True)
except (EdgePromptError, OSError) as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="no limits of a file's size")
@pytest.mark.parametrize("kind", ["npy", "onnx_adapter", "store"])
def test_a_full_disk_is_told(kind: str, tiny_llama_package: Path, tmp_path: Path) -> None:
    from edgeprompt import save_prompt
    from edgeprompt.package.manifest import Manifest
    from exporters.writers import write_npy, write_onnx_adapter
    from tests.support.prompts import make_prompt

    prompt = make_prompt(Manifest.from_json((tiny_llama_package / "edgeprompt.json").read_bytes()), "p")
    save_prompt(prompt, tmp_path / "p.safetensors")
    write_npy(prompt, tmp_path / "x.npy")
    write_onnx_adapter(prompt, tmp_path / "x.onnx_adapter")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, kind, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("disk full" if kind == "onnx_adapter" else "File too large") in done.stdout
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".weights"}
    assert after == before
