from __future__ import annotations

import asyncio
import dataclasses
import gc
import shutil
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt import (
    BaseMismatchError,
    EdgePromptError,
    EngineOptions,
    InputError,
    PromptFileError,
    PromptNotFoundError,
    Request,
    RequestTimeoutError,
    Runtime,
)
from edgeprompt.manifest import Base
from edgeprompt.prompt_file import Golden, PromptFile, save_prompt
from edgeprompt.request import GenerationOptions
from tests.prompts import make_prompt

QUIET = EngineOptions(provider="cpu", threads=1, spinning=False)
WORDS = {"x": (" good",), "y": (" bad",)}


@pytest.fixture(scope="module")
def runtime(tiny_llama_package: Path) -> Iterator[Runtime]:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as loaded:
        loaded.add_prompt(make_prompt(loaded.manifest, "words", verbalizer=WORDS))
        loaded.add_prompt(make_prompt(loaded.manifest, "story", seed=1))
        yield loaded


def test_one_text_or_a_list(runtime: Runtime) -> None:
    one = runtime.classify("the film", prompt="words")
    assert one.label in WORDS
    assert sum(one.scores.values()) == pytest.approx(1)
    assert one.timings.ttft > 0
    two = runtime.classify(["the film", {"text": "the story"}], prompt="words")
    assert dict(two[0].logits) == dict(one.logits)
    assert len(two) == 2
    assert runtime.classify([], prompt="words") == []
    assert runtime.provider == "cpu"


def test_one_text_many_tasks(runtime: Runtime) -> None:
    found = runtime.run_tasks("the film", ["words", "story"])
    assert found["words"].label == runtime.classify("the film", prompt="words").label
    assert found["story"].token_ids == runtime.generate("the film", prompt="story").token_ids


def test_stream_is_generate_in_pieces(runtime: Runtime) -> None:
    settings = {"max_new_tokens": 30, "temperature": 0.9, "seed": 3}
    whole = runtime.generate("the film", prompt="story", **settings)
    pieces = list(runtime.stream("the film", prompt="story", **settings))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


def test_stop_ends_before_the_stop_string(runtime: Runtime) -> None:
    settings = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}
    text = runtime.generate("the film", prompt="story", **settings).text
    stop = text[len(text) // 2 :][:3]
    found = runtime.generate("the film", prompt="story", stop=stop, **settings)
    assert found.text == text[: text.find(stop)]
    assert found.finish_reason == "stop"
    assert "".join(runtime.stream("the film", prompt="story", stop=stop, **settings)) == found.text


def test_choices_are_the_only_answers(runtime: Runtime) -> None:
    choices = (" good", " good story", " bad actors")
    greedy = runtime.generate("the film", prompt="story", choices=choices)
    assert greedy.text in choices
    assert greedy.finish_reason == "stop"
    drawn = runtime.run(
        [
            Request("the film", "story", options=GenerationOptions(choices=choices, temperature=5.0, seed=seed))
            for seed in range(40)
        ]
    )
    assert {result.text for result in drawn} == set(choices)


def test_a_choice_longer_than_the_reserved_room_is_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match=r"longest of the choices has \d+ tokens, and max_new_tokens is 64"):
        runtime.generate("the film", prompt="story", choices=(" good" * 200, " bad"))
    choices = (" good" * 100, " good" * 99)
    assert runtime.generate("the film", prompt="story", choices=choices, max_new_tokens=200).text in choices


def test_same_seed_same_text_in_any_company(runtime: Runtime) -> None:
    request = Request("the film", "story", options=GenerationOptions(max_new_tokens=20, temperature=1.0, seed=5))
    others = [Request("a long story", options=GenerationOptions(max_new_tokens=9, temperature=1.0)) for _ in range(5)]
    alone = runtime.run([request])[0]
    assert runtime.run([*others, request, *others])[5].token_ids == alone.token_ids
    seeds = {runtime.generate("the film", max_new_tokens=20, temperature=1.0).token_ids for _ in range(5)}
    assert len(seeds) > 1  # without a seed every run differs


def test_a_row_in_error_among_good_ones(runtime: Runtime) -> None:
    requests = [
        Request("the film", "words"),
        Request("the film", "words", input_ids=[9999]),
        Request("x"),
    ]
    found = runtime.run(requests, return_errors=True)
    assert isinstance(found[1], InputError)
    assert found[0].label in WORDS
    with pytest.raises(InputError, match="9999"):
        runtime.run(requests)


def test_an_unknown_prompt_fails_its_row_alone(runtime: Runtime) -> None:
    found = runtime.run([Request("a", "nobody"), Request("a", "words")], return_errors=True)
    assert isinstance(found[0], PromptNotFoundError)
    assert found[1].label in WORDS


def test_what_is_no_text_is_named(runtime: Runtime) -> None:
    for text, match in ((5, "the text is int"), ({"text": 5}, "text of 'text' is int"), ("a\ud800b", "surrogate")):
        with pytest.raises(InputError, match=match):
            runtime.generate(text, max_new_tokens=1)
    for timeout in ("soon", -1, float("nan")):
        with pytest.raises(InputError, match="timeout is"):
            runtime.generate("a", timeout=timeout)
    for wrong, match in (
        ({"options": None}, "options is NoneType"),
        ({"prompt": ["words"]}, "prompt is"),
        ({"input_ids": [1.5]}, "input_ids must be integers"),
        ({"input_ids": "12"}, "input_ids must be integers"),
        ({"input_ids": 5}, "input_ids must be integers"),
    ):
        with pytest.raises(InputError, match=match):
            Request("a", **wrong)
    assert runtime.generate(input_ids=np.array([5, 6]), max_new_tokens=1).timings.input_tokens == 2


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_prompt_that_makes_the_logits_nan_has_no_answer(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = runtime._engine._lanes[0].graph
    real = graph.prefill
    monkeypatch.setattr(graph, "prefill", lambda *arguments: real(*arguments) * np.float32("nan"))
    for ask in (lambda: runtime.classify("a", prompt="words"), lambda: runtime.generate("a", prompt="story")):
        with pytest.raises(EdgePromptError, match="logits are NaN"):
            ask()


def test_a_stream_that_nobody_reads_is_cancelled(runtime: Runtime) -> None:
    rows = runtime._engine._lanes[0]._rows
    settings = {"max_new_tokens": 250, "temperature": 5.0, "seed": 1}
    runtime.stream("the film", **settings)
    closed = runtime.stream("the film", **settings)
    closed.close()
    assert list(closed) == []
    runtime.generate("the film", max_new_tokens=1)  # behind both
    deadline = time.monotonic() + 20
    while rows:
        assert time.monotonic() < deadline


def test_a_stream_is_closed_while_another_thread_waits_for_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, go = runtime._engine._lanes[0].graph, threading.Event()
    real = graph.decode
    monkeypatch.setattr(graph, "decode", lambda *arguments: (go.wait(20), real(*arguments))[1])
    pieces = runtime.stream("the film", max_new_tokens=250, temperature=5.0, seed=1)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(pieces))
    reader.start()
    pieces.close()
    go.set()
    reader.join(20)
    assert not reader.is_alive()
    assert len(found) < 20


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01, 0.03])
def test_an_async_stream_can_be_cancelled_at_any_time(runtime: Runtime, delay: float) -> None:
    async def read() -> None:
        async for _ in runtime.astream("the film", max_new_tokens=250, temperature=5.0, seed=1):
            pass

    async def talk() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(talk())


def test_async_calls_take_what_the_others_take(runtime: Runtime) -> None:
    ids = runtime._package.tokenizer.encode("the film")

    async def talk() -> None:
        found = await runtime.agenerate(input_ids=ids, prompt="story", max_new_tokens=3, timeout=20)
        assert found.token_ids == runtime.generate("the film", prompt="story", max_new_tokens=3).token_ids
        assert (await runtime.aclassify("a" * 9999, prompt="words", truncate=True, timeout=20)).label in WORDS
        with pytest.raises(RequestTimeoutError):
            await runtime.agenerate("the film", max_new_tokens=200, timeout=0)
        with pytest.raises(InputError, match="9999"):
            await runtime.arun([Request(input_ids=[9999]), Request("a"), Request(input_ids=[9999])])

    asyncio.run(talk())


def test_asyncio(runtime: Runtime) -> None:
    async def talk() -> tuple[object, ...]:
        label, text = await asyncio.gather(
            runtime.aclassify("the film", prompt="words"),
            runtime.agenerate("the film", prompt="story", max_new_tokens=5),
        )
        pieces = [piece async for piece in runtime.astream("the film", prompt="story", max_new_tokens=5)]
        late = asyncio.create_task(runtime.agenerate("the film", max_new_tokens=200, temperature=5, seed=1))
        await asyncio.sleep(0.01)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        return label, text, pieces

    label, text, pieces = asyncio.run(talk())
    assert label.label == runtime.classify("the film", prompt="words").label
    assert "".join(pieces) == text.text


def test_wrong_options_are_named(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="unknown option 'max_tokens'; known: max_new_tokens"):
        runtime.generate("a", max_tokens=3)
    with pytest.raises(InputError, match="not both"):
        runtime.generate("a", options=GenerationOptions(), top_k=3)
    with pytest.raises(InputError, match="needs 'text'"):
        runtime.classify({"question": "a"}, prompt="words")
    with pytest.raises(InputError, match="list of texts"):
        runtime.embed("a")


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
    runtime._engine._prefixes.remove(runtime._engine._prompts["file"])
    with pytest.raises(PromptFileError, match="has changed since it was added; add it again"):
        runtime.logits("a", prompt="file")
    path.unlink()
    with pytest.raises(PromptFileError, match="cannot read prompt file"):
        runtime.logits("a", prompt="file")
    assert runtime.classify("a", prompt="words").label in WORDS
    runtime.remove_prompt("file")


def test_a_folder_of_prompts_is_read_on_demand(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for index in range(30):
            save_prompt(make_prompt(runtime.manifest, "any", seed=index), tmp_path / f"task{index}.safetensors")
        runtime.add_folder(tmp_path)
        assert len(runtime.prompts) == 30
        assert not runtime._prompts
        first = runtime.logits("a", prompt="task7")
        assert list(runtime._prompts) == ["task7"]
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
        real = runtime.add_prompt
        monkeypatch.setattr(
            runtime, "add_prompt", lambda path, **keywords: (added.append(str(path)), real(path, **keywords))[1]
        )
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
            real = runtime._engine._compute

            def compute(*arguments: object) -> object:
                nonlocal computed
                computed += 1
                return real(*arguments)

            runtime._engine._compute = compute
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


def test_a_package_that_moves_away_keeps_running(tiny_llama_package: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_package, tmp_path / "package")
    with edgeprompt.load(tmp_path / "package", options=QUIET) as runtime:
        before = runtime.generate("the film", max_new_tokens=5).token_ids
        shutil.rmtree(tmp_path / "package")
        assert runtime.generate("the film", max_new_tokens=5).token_ids == before
