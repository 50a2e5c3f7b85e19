"""Streams and asyncio: the same answers in pieces or awaited, and calls that end early."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from edgeprompt import InputError, Request, RequestTimeoutError, Runtime
from tests.support.runtimes import WORDS


def test_stream_is_generate_in_pieces(runtime: Runtime) -> None:
    settings = {"max_new_tokens": 30, "temperature": 0.9, "seed": 3}
    whole = runtime.generate("the film", prompt="story", **settings)
    pieces = list(runtime.stream("the film", prompt="story", **settings))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


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
