"""OpenAI's npm package as a client of the server, unchanged."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt import names
from tests.js.conftest import HOME
from tests.server.conftest import CHAT_TEMPLATE
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET
from tests.support.server import Running, serving
from tests.support.skips import missing


@pytest.fixture
def server(tiny_llama_package: Path, tmp_path: Path) -> Iterator[Running]:
    folder = tmp_path / "package"
    folder.mkdir()
    for file in tiny_llama_package.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / names.CHAT_TEMPLATE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    with edgeprompt.load(folder, options=QUIET) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "story", seed=1))
        with serving(runtime) as running:
            yield running


def test_the_npm_client_works_unchanged(server: Running, node: str) -> None:
    if not (HOME / "node_modules/openai").exists():
        missing("the npm package openai is not installed")
    done = subprocess.run(
        [node, "test/openai.mjs", server.url], cwd=HOME, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, runtime = json.loads(done.stdout), server.runtime
    expected = runtime.generate("a long story", prompt="story", max_new_tokens=6)
    assert (found["completion"], found["pieces"]) == (expected.text, expected.text)
    assert found["tokens"] == len(expected.token_ids)
    said = runtime.chat([{"role": "user", "content": "the film"}], prompt="story", max_new_tokens=6)
    assert (found["chat"], found["streamed"]) == (said.text, said.text)
    assert found["usage"]["completion_tokens"] == len(said.token_ids)
    assert found["models"] == [runtime.manifest.base.name, "story"]
    vectors = runtime.embed(["the film", "never again"])
    np.testing.assert_allclose(np.asarray(found["vectors"], np.float32), vectors, atol=1e-6)
    assert found["refused"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
    assert found["chunks"] == 3
    end = time.monotonic() + 20
    while server.runtime.status().running and time.monotonic() < end:
        time.sleep(0.01)
    assert (server.runtime.status().waiting, server.runtime.status().running) == (0, 0)
