"""The packed npm package, in a folder of its own, loads as an ES module and as CommonJS, and answers as Python does."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

import edgeprompt
from tests.support.runtimes import QUIET

_BODY = """
  const runtime = await load(process.argv[2]);
  console.log(JSON.stringify((await runtime.generate("a", { maxNewTokens: 5 })).tokenIds));
  await runtime.close();
"""
_SAMPLES = {
    "esm.mjs": f'import {{ load }} from "edgeprompt";{_BODY}',
    "commonjs.cjs": f'const {{ load }} = require("edgeprompt");(async () => {{{_BODY}}})();',
}


@pytest.fixture(scope="module")
def app(node: str, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An app's folder with what `npm pack` packs in node_modules, and ONNX Runtime beside it."""
    folder = tmp_path_factory.mktemp("app")
    done = subprocess.run(
        ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", folder],
        cwd=built, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    modules = folder / "node_modules"
    with tarfile.open(folder / done.stdout.split()[-1]) as packed:
        packed.extractall(folder, filter="data")
    modules.mkdir()
    (folder / "package").rename(modules / "edgeprompt")
    for name in ("onnxruntime-node", "onnxruntime-common"):
        (modules / name).symlink_to(built / "node_modules" / name)
    return folder


@pytest.mark.parametrize("name", _SAMPLES)
def test_the_packed_package_answers(node: str, app: Path, tiny_llama_package: Path, name: str) -> None:
    (app / name).write_text(_SAMPLES[name], "utf-8")
    done = subprocess.run(
        [node, app / name, f"{tiny_llama_package}/"], cwd=app, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        expected = runtime.generate("a", max_new_tokens=5)
    assert json.loads(done.stdout) == list(expected.token_ids)
