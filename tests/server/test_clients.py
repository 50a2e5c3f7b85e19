"""Programs that people have, as clients: curl, and the command `llm` with its configuration for OpenAI's API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Running

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_curl_as_the_documentation_has_it(decoder: Running, encoder: Running) -> None:
    """Every curl of docs/serving.md, with the names of prompts that are here."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (commands,) = [re.sub(r"\\\n\s*", "", (ROOT / "docs" / "serving.md").read_text("utf-8"))]
    found = [line for line in commands.splitlines() if line.startswith("curl ")]
    assert len(found) >= 5
    asked: dict[str, Any] = {}
    for line in found:
        path = re.search(r":8080(/\S+)", line)
        assert path is not None
        server = encoder if path[1] in ("/v1/tag", "/v1/answer") else decoder
        for shown, here in (("sentiment", "words"), ("restore", "story"), ("ner", "tag")):
            line = line.replace(f'"model": "{shown}"', f'"model": "{here}"')
        asked[path[1]] = run(["bash", "-c", line.replace("http://127.0.0.1:8080", server.url) + " -sS --fail"])
    texts = ["A thoughtful film that earns its tears.", "Not again."]
    labels = [one.label for one in decoder.runtime.classify(texts, prompt="words")]
    assert [one["label"] for one in json.loads(asked["/v1/classify"])["data"]] == labels
    assert asked["/v1/completions"].strip().endswith("data: [DONE]")
    assert json.loads(asked["/v1/tag"])["data"][0]["words"]
    assert {"answer", "start", "end", "score"} <= set(json.loads(asked["/v1/answer"])["data"][0])
    assert [one["id"] for one in json.loads(asked["/v1/models"])["data"]][1:] == ["words", "story"]


@pytest.mark.slow
def test_llm(chatting: Running, tmp_path: Path) -> None:
    base = f'api_base: "{chatting.url}/v1"'
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: story\n  {base}\n"
        f"- model_id: plain\n  model_name: story\n  {base}\n  completion: true\n",
        "utf-8",
    )
    # Without plugins: one that brings a model of its own needs a compiler.
    variables = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": "none"}
    llm = [sys.executable, "-m", "llm", "-m"]
    said = chatting.runtime.chat([{"role": "user", "content": "the film"}], prompt="story", max_new_tokens=6)
    for more in ([], ["--no-stream"]):
        out = run([*llm, "here", "the film", "-o", "max_tokens", "6", *more], **variables)
        assert out.strip() == said.text.strip()
    expected = chatting.runtime.generate("the film", prompt="story", max_new_tokens=6)
    out = run([*llm, "plain", "the film", "-o", "max_tokens", "6", "--no-stream"], **variables)
    assert out.strip() == expected.text.strip()
