"""Who is compared, and the environment that each runs in."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.bases import EIGHT, FILE, LARGE_BLOCKS

HERE = Path(__file__).resolve().parent
SOURCES = ("edgeprompt", "exporters", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
"""What an installation is made of."""


@dataclass(frozen=True)
class Peer:
    """One way to do the work. `module` is a file in `workers`, `variant` what it is told to load."""

    name: str
    title: str
    module: str
    variant: str
    environment: str
    """A file in `requirements`; "edgeprompt": this checkout, installed as users install it for a device."""

    @property
    def ours(self) -> bool:
        """Whether it is edgeprompt."""
        return self.environment == "edgeprompt"


PEERS = (
    Peer("edgeprompt", "edgeprompt, the file's blocks", "ours", FILE, "edgeprompt"),
    Peer("edgeprompt-int8", "edgeprompt, int8", "ours", EIGHT, "edgeprompt"),
    Peer("edgeprompt-int4-128", "edgeprompt, int4, blocks of 128", "ours", LARGE_BLOCKS, "edgeprompt"),
    Peer("llamacpp", "llama.cpp", "llamacpp", "", "llamacpp"),
    Peer("genai", "onnxruntime-genai, int4", "genai", "genai", "genai"),
    Peer("genai-pruned", "onnxruntime-genai, int4, prune_lm_head", "genai", "genai-pruned", "genai"),
    Peer("pytorch", "PEFT on PyTorch, fp32", "pytorch", "fp32", "pytorch"),
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
    for name in (peer.name, peer.environment):
        if name in given:
            return given[name]
    home = folder / peer.environment
    python = home / "bin/python"
    with tempfile.TemporaryDirectory() as scratch:
        wanted, what = _wanted(peer, Path(scratch))
        stamp = home / ".installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        venv.create(home, with_pip=True, clear=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise RuntimeError(said[-1])
    stamp.write_text(wanted)
    return python


def _wanted(peer: Peer, scratch: Path) -> tuple[str, list[str]]:
    """What tells whether an environment is up to date, and what pip is to install."""
    if not peer.ours:
        file = HERE / "requirements" / f"{peer.environment}.txt"
        return file.read_text(), ["-r", str(file)]
    digest = hashlib.sha256()
    for name in SOURCES:
        source = HERE.parents[1] / name
        for file in sorted(source.rglob("*.[ph]*")) if source.is_dir() else [source]:
            if "__pycache__" not in file.parts:
                digest.update(file.read_bytes())
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, scratch / name)  # a build folder in the checkout could hold files that are gone
    return digest.hexdigest(), ["-c", str(HERE.parents[1] / "constraints.txt"), f"{scratch}[cpu]"]
