"""Prompts of a runtime: added, replaced, read from folders, checked, calibrated, and their prefixes on disk."""

from __future__ import annotations

import dataclasses
import gc
import threading
import tracemalloc
from pathlib import Path

import pytest

import edgeprompt
from edgeprompt import BaseMismatchError, InputError, PromptFileError, PromptNotFoundError, Request, Runtime
from edgeprompt.package.manifest import Base
from edgeprompt.prompts import registry
from edgeprompt.prompts.file import Golden, PromptFile, save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS


def test_a_prompt_of_another_base_is_refused(runtime: Runtime) -> None:
    other = dataclasses.replace(make_prompt(runtime.manifest, "other"), base=Base("gpt9", "sha256:9"))
    with pytest.raises(BaseMismatchError, match="gpt9"):
        runtime.add_prompt(other)
    assert "other" not in runtime.prompts
    runtime.add_prompt(other, allow_base_mismatch=True)
    runtime.remove_prompt("other")


def test_a_prompt_file_that_changes_or_goes(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_prompt(make_prompt(runtime.manifest, "file"), path)
    assert runtime.add_prompt(path) == "file"
    assert runtime.prompt("file").num_virtual_tokens == 4
    before = runtime.logits("a", prompt="file")
    save_prompt(make_prompt(runtime.manifest, "file", seed=5), path)
    assert (runtime.logits("a", prompt="file") == before).all()  # its prefix is resident
    runtime._engine.forget(runtime._prompts.find("file"))
    with pytest.raises(PromptFileError, match="has changed since it was added; add it again"):
        runtime.logits("a", prompt="file")
    path.unlink()
    with pytest.raises(PromptFileError, match="cannot read prompt file"):
        runtime.logits("a", prompt="file")
    assert runtime.classify("a", prompt="words").label in WORDS
    runtime.remove_prompt("file")


def test_a_prompt_file_that_is_replaced_while_it_is_added(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (first, second) = tmp_path / "p.safetensors", [make_prompt(runtime.manifest, "p", seed=n) for n in (1, 2)]
    save_prompt(first, path)
    check = PromptFile.check_base

    def check_slowly(prompt: PromptFile, *args: object) -> None:
        save_prompt(second, path)
        check(prompt, *args)  # type: ignore[arg-type]

    runtime.add_prompt(first, name="first")
    with monkeypatch.context() as patch:
        patch.setattr(PromptFile, "check_base", check_slowly)
        runtime.add_prompt(path)
    assert (runtime.logits("a", prompt="p") == runtime.logits("a", prompt="first")).all()
    runtime.remove_prompt("p")
    runtime.remove_prompt("first")


def test_a_prompt_file_that_is_replaced_all_the_time(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file often gets the number of an old one, which looked as if somebody wrote into it."""
    monkeypatch.setattr(registry, "_TRIES", 2)
    path, prompt, stop = tmp_path / "p.safetensors", make_prompt(runtime.manifest, "p"), threading.Event()
    save_prompt(prompt, path)

    def write() -> None:
        while not stop.wait(0.002):
            save_prompt(prompt, path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(registry._open_settled(tmp_path, "p") for _ in range(20))
    finally:
        stop.set()
        writer.join()


def test_a_prompt_file_that_goes_while_it_is_found(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_prompt(make_prompt(runtime.manifest, "going"), tmp_path / "going.safetensors")
    runtime.add_folder(tmp_path)
    plain = registry._read
    monkeypatch.setattr(registry, "_read", lambda file: (file.unlink(), plain(file))[1])
    with pytest.raises(PromptNotFoundError, match="no prompt 'going'"):
        runtime.logits("a", prompt="going")


def test_a_prompt_file_that_is_replaced_while_a_request_waits(tiny_llama_package: Path, tmp_path: Path) -> None:
    """The docs said that such a request keeps the old prompt, and the error that somebody added it."""
    options = dataclasses.replace(QUIET, prefix_budget=0, max_batch=1)
    with edgeprompt.load(tiny_llama_package, options=options) as runtime:
        save_prompt(make_prompt(runtime.manifest, "p"), tmp_path / "p.safetensors")
        runtime.add_folder(tmp_path)
        prompt = runtime._prompts.find("p")
        save_prompt(make_prompt(runtime.manifest, "p", seed=1), tmp_path / "p.safetensors")
        with pytest.raises(PromptFileError, match="has changed since it was asked for; ask again"):
            runtime._engine.submit(Request("a", "p", task="logits"), prompt).result(20)
        assert runtime.logits("a", prompt="p").size


def test_a_folder_of_prompts_is_read_on_demand(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for index in range(30):
            save_prompt(make_prompt(runtime.manifest, "any", seed=index), tmp_path / f"task{index}.safetensors")
        (tmp_path / ".hidden.safetensors").write_bytes((tmp_path / "task0.safetensors").read_bytes())
        runtime.add_folder(tmp_path)
        assert len(runtime.prompts) == 30  # all that a request can name
        assert not runtime._prompts._prompts
        first = runtime.logits("a", prompt="task7")
        assert list(runtime._prompts._prompts) == ["task7"]
        save_prompt(make_prompt(runtime.manifest, "any", seed=99), tmp_path / "task7.safetensors")
        assert (runtime.logits("a", prompt="task7") != first).any()  # the new file is served
        for name in ("task30", "../task1", "", ".hidden"):
            with pytest.raises(PromptNotFoundError):
                runtime.logits("a", prompt=name)
        (tmp_path / "task7.safetensors").write_bytes(b"broken")
        with pytest.raises(PromptFileError, match="task7"):
            runtime.logits("a", prompt="task7")
        (tmp_path / "task7.safetensors").unlink()
        with pytest.raises(PromptNotFoundError):
            runtime.logits("a", prompt="task7")
        with pytest.raises(InputError, match="no folder"):
            runtime.add_folder(tmp_path / "nothing")


def test_a_prompt_that_many_ask_for_first_is_read_once(
    tiny_llama_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        save_prompt(make_prompt(runtime.manifest, "any"), tmp_path / "task.safetensors")
        runtime.add_folder(tmp_path)
        added: list[str] = []
        real = runtime._engine.accept
        monkeypatch.setattr(runtime._prompts, "_accept", lambda prompt: (added.append(prompt.name), real(prompt))[1])
        threads = [threading.Thread(target=runtime.logits, args=("a",), kwargs={"prompt": "task"}) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(added) == 1


def test_prompts_of_files_take_little_memory(tiny_llama_package: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUIET, prefix_budget=0)
    with edgeprompt.load(tiny_llama_package, options=options) as runtime:
        for index in range(100):
            prompt = make_prompt(runtime.manifest, f"p{index}", count=200, seed=index, verbalizer=WORDS)
            save_prompt(prompt, tmp_path / f"p{index}.safetensors")
        runtime.add_prompt(tmp_path / "p0.safetensors")
        tracemalloc.start()
        try:
            for index in range(1, 100):
                runtime.add_prompt(tmp_path / f"p{index}.safetensors")
            gc.collect()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept / 99 < 10_000  # the file has 51,200 bytes of rows
        assert runtime.classify("the film", prompt="p50").label in WORDS


def test_golden_examples(runtime: Runtime) -> None:
    story = runtime.generate("the film", prompt="story", max_new_tokens=4)
    golden = Golden({"text": "the film"}, token_ids=story.token_ids)
    runtime.add_prompt(_with(runtime.prompt("story"), "golden", golden))
    assert runtime.check("golden").passed
    runtime.add_prompt(_with(runtime.prompt("story"), "golden", dataclasses.replace(golden, token_ids=(1, 2))))
    failed = runtime.check("golden")
    assert not failed.passed
    assert (failed.expected, failed.found) == ((1, 2), story.token_ids[:2])
    label = runtime.classify("the film", prompt="words")
    golden = Golden({"text": "the film"}, label.label, logits={"x": label.logits["x"] + 0.25})
    runtime.add_prompt(_with(runtime.prompt("words"), "golden", golden))
    checked = runtime.check("golden")
    assert checked.passed
    assert checked.max_logit_difference == pytest.approx(0.25)
    for broken, match in (
        (Golden({"text": "a"}), "neither a label nor tokens"),
        (Golden({"text": "a"}, token_ids=(1,), logits={"512": 1.0}), "names token 512; the base has 512"),
    ):
        runtime.add_prompt(_with(runtime.prompt("story"), "golden", broken))
        with pytest.raises(InputError, match=match):
            runtime.check("golden")
    runtime.remove_prompt("golden")
    with pytest.raises(InputError, match="no golden example"):
        runtime.check("words")


def _with(prompt: PromptFile, name: str, golden: Golden) -> PromptFile:
    return dataclasses.replace(prompt, name=name, golden=golden)


def test_contextual_calibration_levels_texts_without_content(runtime: Runtime) -> None:
    prior = runtime.calibration("words", ["", "N/A"])
    runtime.add_prompt(dataclasses.replace(runtime.prompt("words"), name="level", calibration=prior))
    plain = runtime.classify("the film", prompt="words")
    level = runtime.classify("the film", prompt="level")
    ratio = (level.scores["x"] / level.scores["y"]) / (plain.scores["x"] / plain.scores["y"])
    assert ratio == pytest.approx(2.718281828 ** (prior[1] - prior[0]), rel=1e-4)
    runtime.remove_prompt("level")


def test_prefixes_on_disk(tiny_llama_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = dataclasses.replace(QUIET, cache_folder=tmp_path / "prefixes")

    def logits() -> tuple[list[float], int]:
        with edgeprompt.load(tiny_llama_package, options=options) as runtime:
            computed = 0
            real = runtime._engine._prefixes.compute

            def compute(*arguments: object) -> object:
                nonlocal computed
                computed += 1
                return real(*arguments)

            runtime._engine._prefixes.compute = compute
            runtime.add_prompt(make_prompt(runtime.manifest, "p"))
            return runtime.logits("the film", prompt="p").tolist(), computed

    first, computed = logits()
    assert computed == 1
    assert logits() == (first, 0)
    (file,) = (tmp_path / "prefixes").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    for broken in (bytes(data), data[:100], b""):
        file.write_bytes(broken)
        assert logits() == (first, 1)
        assert "is not used and is computed again" in caplog.text
        caplog.clear()
        assert logits() == (first, 0)
