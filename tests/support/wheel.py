"""The built wheel, and environments of its own for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pip(python: Path | str, *arguments: object) -> None:
    """Run pip of an environment; `-I`: no PYTHONPATH makes it believe that the package is installed already."""
    command = [python, "-I", "-m", "pip", *map(str, arguments), "-q", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, made from a copy: a build folder left there would put files that are gone into it."""
    for name in ("edgeprompt", "exporters"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


def environment(home: Path, wheel: Path, extra: str) -> Path:
    """Python of a new environment that holds the wheel with one extra and nothing else."""
    venv.create(home, with_pip=True)
    pip(home / "bin/python", "install", "-c", ROOT / "constraints.txt", f"{wheel}[{extra}]")
    return home / "bin/python"


def ask(python: Path, *arguments: object) -> str:
    """What a command of an environment prints; `-I`: neither the checkout nor this environment's variables leak in."""
    done = subprocess.run(
        [python, "-I", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=python.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
