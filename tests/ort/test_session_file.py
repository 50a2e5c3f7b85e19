"""Saved sessions: another process goes on where one was, and a session of anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import edgeprompt
from edgeprompt import EngineOptions, Message, Runtime
from edgeprompt.errors import CapacityError, InputError, PromptNotFoundError
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEXT = "The film is slow and the end is no surprise, yet the music stays. " * 2
LONGER = TEXT + "What do you think of it?"


def _open(package: Path) -> Runtime:
    runtime = edgeprompt.load(package, options=QUIET)
    runtime.add_prompt(make_prompt(runtime.manifest, "x"))
    return runtime


@pytest.fixture
def chat_package(tiny_llama_package: Path, tmp_path: Path) -> Path:
    pytest.importorskip("jinja2")
    package = Path(shutil.copytree(tiny_llama_package, tmp_path / "package"))
    (package / "chat_template.jinja").write_text(CHAT)
    return package


@pytest.fixture(params=[None, "x"], ids=["base", "prompt"])
def name(request: pytest.FixtureRequest) -> str | None:
    found: str | None = request.param
    return found


def test_another_runtime_goes_on(tiny_llama_package: Path, tmp_path: Path, name: str | None) -> None:
    path = tmp_path / "one.session"
    with _open(tiny_llama_package) as first:
        first.generate(TEXT, prompt=name, max_new_tokens=2)
        saved = first.save_session(path, TEXT, prompt=name)
    with _open(tiny_llama_package) as alone:
        expected = alone.generate(LONGER, prompt=name, max_new_tokens=12)
    with _open(tiny_llama_package) as second:
        assert second.load_session(path) == saved >= 32
        answer = second.generate(LONGER, prompt=name, max_new_tokens=12)
        assert answer.token_ids == expected.token_ids
        assert answer.timings.reused_tokens == saved
        assert (
            second.generate(LONGER, prompt="x" if name is None else None, max_new_tokens=1).timings.reused_tokens == 0
        )


def test_a_conversation_goes_on(chat_package: Path, tmp_path: Path) -> None:
    turns: list[Message] = [{"role": "user", "content": TEXT}]
    path = tmp_path / "chat.session"
    with _open(chat_package) as first:
        turns.append({"role": "assistant", "content": first.chat(turns, max_new_tokens=4).text})
        saved = first.save_session(path, messages=turns[:1])
    with _open(chat_package) as second:
        second.load_session(path)
        answer = second.chat([*turns, {"role": "user", "content": "And why?"}], max_new_tokens=4)
        assert answer.timings.reused_tokens == saved


def test_a_prompt_that_is_gone_takes_its_session_along(tiny_llama_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.session"
    with _open(tiny_llama_package) as runtime:
        runtime.generate(TEXT, prompt="x", max_new_tokens=1)
        runtime.save_session(path, TEXT, prompt="x")
        runtime.remove_prompt("x")
        with pytest.raises(PromptNotFoundError):
            runtime.load_session(path)
        other = make_prompt(runtime.manifest, "x")
        assert other.prompt_embeddings is not None
        runtime.add_prompt(dataclasses.replace(other, prompt_embeddings=other.prompt_embeddings * 2))
        with pytest.raises(InputError, match="belongs to another prompt 'x'"):
            runtime.load_session(path)


def test_what_does_not_fit_is_refused(tiny_llama_package: Path, tmp_path: Path, name: str | None) -> None:
    path = tmp_path / "one.session"
    with _open(tiny_llama_package) as runtime:
        with pytest.raises(InputError, match=r"Ask this text first \(rt\.generate\), then save it"):
            runtime.save_session(path, TEXT, prompt=name)
        assert not path.exists()
        runtime.generate(TEXT, prompt=name, max_new_tokens=1)
        runtime.save_session(path, TEXT, prompt=name)
        runtime.save_session(path, TEXT, prompt=name)  # one of ours is replaced
        notes = tmp_path / "notes.txt"
        notes.write_text("mine")
        with pytest.raises(InputError, match=r"notes\.txt"):
            runtime.save_session(notes, TEXT, prompt=name)
        assert notes.read_text() == "mine"
        for nowhere in (tmp_path / ("x" * 300) / "one.session", notes / "one.session", "a\0b"):
            with pytest.raises(InputError, match=r"^output .*; give another (path|one)$"):
                runtime.save_session(nowhere, TEXT, prompt=name)
        for wrong in (tmp_path / "none", tmp_path, notes):
            with pytest.raises(InputError, match="session"):
                runtime.load_session(wrong)
        with safe_open(path, "numpy") as file:
            metadata, kept = file.metadata(), file.get_tensor("past_key_values")
        broken = kept.copy()
        broken[0, 0, 0, 0] += 1
        for tensor, words in (
            (broken, "bytes have changed"),
            (kept[:, :, :-1], "do not fit"),
            (kept[:-2], "do not fit"),
        ):
            save_file({"past_key_values": np.ascontiguousarray(tensor)}, tmp_path / "b.session", metadata=metadata)
            with pytest.raises(InputError, match=words):
                runtime.load_session(tmp_path / "b.session")
        for fact in ("weights_hash", "provider", "dtype", "onnxruntime", "machine", "block"):
            about = metadata["edgeprompt_session"].replace(f'"{fact}":', f'"{fact}":"other","_":', 1)
            save_file({"past_key_values": kept}, tmp_path / "c.session", metadata={"edgeprompt_session": about})
            with pytest.raises(InputError, match=f"saved with another {fact}"):
                runtime.load_session(tmp_path / "c.session")
        about = {**json.loads(metadata["edgeprompt_session"]), "facts": []}
        save_file({"past_key_values": kept}, path.with_name("d"), metadata={"edgeprompt_session": json.dumps(about)})
        with pytest.raises(InputError, match="is no session that can be read"):
            runtime.load_session(path.with_name("d"))
    with edgeprompt.load(tiny_llama_package, options=EngineOptions(prefix_budget=4096)) as small:
        small.add_prompt(make_prompt(small.manifest, "x"))
        with pytest.raises(CapacityError, match="raise prefix_budget"):
            small.load_session(path)
