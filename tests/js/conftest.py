"""Node.js, the npm package built, and a way to ask it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.skips import missing

HOME = Path(__file__).resolve().parents[2] / "js"


@pytest.fixture(scope="session")
def node() -> str:
    """Node.js of version 20 or later."""
    found = shutil.which("node")
    if found is None:
        missing("Node.js is not installed")
    assert found is not None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().lstrip("v").split(".")[0]) < 20:
        missing(f"Node.js is {version.strip()}, 20 is needed")
    return found


@pytest.fixture(scope="session")
def built(node: str) -> Path:
    """js/, with its packages installed, and built when sources are newer than what was built."""
    if not (HOME / "node_modules/onnxruntime-node").exists():
        missing("js/node_modules is not installed")
    target = HOME / "dist/index.js"
    sources = [*HOME.glob("src/**/*.ts"), HOME / "build.mjs", HOME / "package.json"]
    if not target.exists() or max(file.stat().st_mtime for file in sources) > target.stat().st_mtime:
        done = subprocess.run([node, "build.mjs"], cwd=HOME, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return HOME


@pytest.fixture(scope="session")
def ask(node: str, built: Path) -> Callable[..., Any]:
    """`ask(way, **what)`: what `js/test/drive.mjs` answers."""

    def run(way: str, **what: Any) -> Any:
        done = subprocess.run(
            [node, built / "test/drive.mjs"],
            input=json.dumps({"way": way, **what}),
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def chromium(node: str, built: Path) -> dict[str, Any]:
    """How a Chromium that runs here is started: that of the npm packages, else an installed one."""
    done = subprocess.run(
        [node, built / "tools/chromium.mjs"], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] | None = json.loads(done.stdout)
    if found is None:
        missing("no Chromium runs here, neither @sparticuz/chromium's nor an installed one")
    assert found is not None
    return found
