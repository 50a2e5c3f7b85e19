"""Who is compared, and the environment that each runs in."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """One way to do the work. `module` is a file in `workers`, `variant` what it is told to load."""

    name: str
    title: str
    module: str
    variant: str
    environment: str | None
    """A file in `requirements`; None: the project's own environment."""
    ours: bool = False


PEERS = (
    Peer("edgeprompt", "edgeprompt, int4, genai route", "ours", "int4-genai", None, ours=True),
    Peer("edgeprompt-torch", "edgeprompt, int4, torch route", "ours", "int4-torch", None, ours=True),
    Peer("edgeprompt-int4-128", "edgeprompt, int4, blocks of 128", "ours", "int4-128-genai", None, ours=True),
    Peer("edgeprompt-int8", "edgeprompt, int8", "ours", "int8-genai", None, ours=True),
    Peer("llamacpp", "llama.cpp, Q4_1", "llamacpp", "", "llamacpp"),
    Peer("genai", "onnxruntime-genai, int4", "genai", "genai", "genai"),
    Peer("genai-pruned", "onnxruntime-genai, int4, prune_lm_head", "genai", "genai-pruned", "genai"),
    Peer("pytorch", "PEFT on PyTorch, fp32", "pytorch", "fp32", "pytorch"),
    Peer("pytorch-int8", "PEFT on PyTorch, dynamic int8", "pytorch", "int8", "pytorch"),
    Peer("pytorch-bf16", "PEFT on PyTorch, bf16", "pytorch", "bf16", "pytorch"),
    Peer("optimum", "Optimum ORTModel, fp32", "optimum_peer", "", "optimum"),
)


def python_of(peer: Peer, folder: Path, given: dict[str, Path]) -> Path:
    """The interpreter that a peer runs in; its environment is made on first use.

    Args:
        peer: whose.
        folder: where environments are kept.
        given: interpreters of environments that exist already, by peer or environment.

    Raises:
        RuntimeError: the environment cannot be made; says why.
    """
    if peer.environment is None:
        return Path(sys.executable)
    for name in (peer.name, peer.environment):
        if name in given:
            return given[name]
    home = folder / peer.environment
    python = home / "bin/python"
    wanted = HERE / "requirements" / f"{peer.environment}.txt"
    stamp = home / ".installed"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return python
    venv.create(home, with_pip=True, clear=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise RuntimeError(said[-1])
    stamp.write_text(wanted.read_text())
    return python
