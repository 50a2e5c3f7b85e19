"""`edgeprompt serve`: what is refused before it listens. tests/server has what it answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import edgeprompt.server.process as process
from edgeprompt import MissingDependencyError


def test_what_cannot_be_served_is_one_line(
    refused: Callable[..., str], tiny_llama_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no package folder" in refused("serve", tmp_path / "nothing", "--port", 0)
    assert "no key is set" in refused("serve", tiny_llama_package, "--host", "0.0.0.0", "--port", 0)
    assert "no folder of prompts" in refused("serve", tiny_llama_package, "--prompts", tmp_path / "none", "--port", 0)
    assert "No such file" in refused("serve", tiny_llama_package, "--api-key-file", tmp_path / "none", "--port", 0)
    (tmp_path / "empty").write_text("\n\n", encoding="utf-8")
    assert "holds no key" in refused("serve", tiny_llama_package, "--api-key-file", tmp_path / "empty", "--port", 0)
    monkeypatch.setenv("EDGEPROMPT_API_KEY", "")
    assert "API key is empty" in refused("serve", tiny_llama_package, "--port", 0)


def test_a_missing_extra_is_named(
    refused: Callable[..., str], tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert "pip install 'edgeprompt[serve]'" in refused("serve", tiny_llama_package)
    with pytest.raises(MissingDependencyError):
        process.import_server()
