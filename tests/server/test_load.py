"""Many clients of many tasks at once: every answer is what the runtime answers alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import edgeprompt
from edgeprompt import Request, Runtime
from edgeprompt.request import GenerationOptions
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS
from tests.support.server import Running, serving

CLIENTS = 64
TASKS = 8
TEXTS = ["the film was good", "a long story about music", "never again", "what a day", "two actors, one room"]
SETTINGS: list[dict[str, Any]] = [{"max_tokens": 6}, {"max_tokens": 9, "temperature": 0.8, "seed": 7}]


@pytest.fixture(params=["decoder", "encoder", "seq2seq"])
def loaded(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server with eight tasks; an encoder's are those of `add_all`, and embeddings."""
    if request.param == "encoder":
        yield request.getfixturevalue("encoder")
        return
    package: Path = (
        request.getfixturevalue("tiny_llama_package")
        if request.param == "decoder"
        else request.getfixturevalue("seq2seq_package")("T5")
    )
    with edgeprompt.load(package, options=QUIET) as runtime:
        for index in range(TASKS):
            fields = {"verbalizer": WORDS} if index % 2 else {}
            runtime.add_prompt(make_prompt(runtime.manifest, f"task{index}", seed=index, **fields))
        with serving(runtime) as running:
            yield running


Question = tuple[str, dict[str, Any], Callable[[Any], Any]]


def questions(runtime: Runtime) -> list[tuple[Question, Any]]:
    """Paths, bodies, how an answer is read, and what the runtime answers when it is asked alone."""
    found: list[tuple[Question, Any]] = []
    for name in runtime.prompts:
        task = runtime.describe(name).task
        for text in TEXTS:
            if task == "classify":
                expected = runtime.classify(text, prompt=name)
                body = {"model": name, "input": text}
                scores = pytest.approx(dict(expected.scores), abs=1e-4)
                found.append((("classify", body, lambda data: data["data"][0]["scores"]), scores))
            elif task == "generate":
                for more in SETTINGS:
                    options = {("max_new_tokens" if key == "max_tokens" else key): more[key] for key in more}
                    asked = Request(text, name, task="generate", options=GenerationOptions(**options))
                    (one,) = runtime.run([asked])
                    for streams in (False, True):
                        body = {"model": name, "prompt": text, "stream": streams, **more}
                        found.append((("completions", body, lambda data: data["choices"][0]["text"]), one.text))  # type: ignore[union-attr]
    for text in TEXTS:
        body = {"model": runtime.manifest.base.name, "input": text}
        vector = pytest.approx(runtime.embed([text])[0].tolist(), abs=1e-4)
        found.append((("embeddings", body, lambda data: data["data"][0]["embedding"]), vector))
    return found


async def ask(client: httpx.AsyncClient, question: Question) -> Any:
    path, body, read = question
    answer = await client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return read(answer.json())
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return "".join(read(json.loads(line)) for line in lines)


def soak(server: Running, *, each: int, seconds: float = 0.0) -> Counter[str]:
    """Every client asks `each` questions, or for some seconds."""
    asked: Counter[str] = Counter()
    known = questions(server.runtime)

    async def client_of(number: int, client: httpx.AsyncClient) -> None:
        rng, end, done = random.Random(number), time.monotonic() + seconds, 0
        while done < each or time.monotonic() < end:
            question, expected = rng.choice(known)
            assert await ask(client, question) == expected, question[:2]
            asked[question[0]] += 1
            done += 1

    async def all_clients() -> None:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(client_of(number, client) for number in range(CLIENTS)))

    asyncio.run(all_clients())
    return asked


def test_every_answer_is_the_runtimes(loaded: Running) -> None:
    asked = soak(loaded, each=4)
    assert asked.total() == 4 * CLIENTS
    assert len(asked) >= 2
    status = loaded.runtime.status()
    assert (status.waiting, status.running) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_answer_is_the_runtimes_for_ten_minutes(loaded: Running) -> None:
    asked = soak(loaded, each=4, seconds=600)
    print(asked)
    assert not [event for event in loaded.log if event["event"] == "failed"]
