"""One life of a request for every architecture: queues, deadlines, cancellation, closing, streams, forks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import (
    CapacityError,
    EdgePromptError,
    InputError,
    Request,
    RequestCancelledError,
    RequestTimeoutError,
    Runtime,
)
from edgeprompt.request import GenerationOptions
from tests.support.runtimes import QUIET, hold

ARCHITECTURES = ("decoder", "encoder", "encoder-decoder")
Open = Callable[..., Runtime]


@pytest.fixture
def package_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    def find(architecture: str) -> Path:
        if architecture == "decoder":
            return request.getfixturevalue("tiny_llama_package")
        if architecture == "encoder":
            return request.getfixturevalue("encoder_package")("BERT")
        return request.getfixturevalue("seq2seq_package")("T5")

    return find


@pytest.fixture(params=ARCHITECTURES)
def load(request: pytest.FixtureRequest, package_of: Callable[[str], Path]) -> Iterator[Open]:
    opened: list[Runtime] = []

    def make(**options: Any) -> Runtime:
        opened.append(edgeprompt.load(package_of(request.param), options=replace(QUIET, **options)))
        return opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


def ask(runtime: Runtime, **fields: Any) -> Request:
    """A request that takes some steps; on an encoder, one."""
    if runtime.manifest.architecture == "encoder-only":
        return Request("the film", task="embed", **fields)
    options = GenerationOptions(max_new_tokens=60, temperature=5.0, seed=1)
    return Request("the film", task="generate", options=options, **fields)


def test_what_runs_and_what_waits_can_be_cancelled(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(max_batch=1)
    begun, go = hold(runtime, monkeypatch)
    running = runtime.submit(ask(runtime))
    assert begun.wait(20)
    waiting, last = runtime.submit(ask(runtime)), runtime.submit(ask(runtime))
    assert running.cancel()
    assert waiting.cancel()
    go.set()
    for job in (running, waiting):
        with pytest.raises(RequestCancelledError, match="cancelled"):
            job.result(20)
    last.result(20)
    assert not last.cancel()


def test_a_late_request_fails_alone(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load()
    begun, go = hold(runtime, monkeypatch)
    late, other = runtime.submit(ask(runtime, timeout=0.05)), runtime.submit(ask(runtime))
    assert begun.wait(20)
    time.sleep(0.1)
    go.set()
    with pytest.raises(RequestTimeoutError, match="timeout"):
        late.result(20)
    other.result(20)


def test_a_full_queue_refuses_submit_and_makes_run_wait(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(max_batch=1, max_queue=2)
    begun, go = hold(runtime, monkeypatch)
    jobs = [runtime.submit(ask(runtime))]
    assert begun.wait(20)
    jobs += [runtime.submit(ask(runtime)) for _ in range(2)]
    with pytest.raises(CapacityError, match="2 requests are waiting"):
        runtime.submit(ask(runtime))
    with pytest.raises(RequestTimeoutError):
        runtime.run([ask(runtime, timeout=0.05)])
    threading.Timer(0.05, go.set).start()
    assert len(runtime.run([ask(runtime)] * 5)) == 5
    assert not wait(jobs, 20).not_done


def test_closing_fails_what_is_in_flight(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(max_batch=1)
    begun, go = hold(runtime, monkeypatch)
    jobs = [runtime.submit(ask(runtime))]
    assert begun.wait(20)
    jobs += [runtime.submit(ask(runtime)) for _ in range(2)]
    threading.Timer(0.05, go.set).start()
    runtime.close()
    for job in jobs[1:]:
        with pytest.raises(RequestCancelledError):
            job.result(20)
    assert jobs[0].done()
    with pytest.raises(InputError, match="closed"):
        runtime.submit(Request("a"))


def test_a_step_that_fails_fails_the_culprit_alone(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load()
    engine: Any = runtime._engine
    match runtime.manifest.architecture:
        case "decoder-only":
            owner, name = engine._lanes[0].graph, "prefill"
            bad = lambda slot, ids, *rest: 9 in ids  # noqa: E731
        case "encoder-only":
            owner, name = type(engine._graph), "run"
            bad = lambda graph, rows, wanted: any(9 in row.ids for row in rows)  # noqa: E731
        case _:
            owner, name = engine._graphs, "encode"
            bad = lambda rows: any(9 in row.ids for row in rows)  # noqa: E731
    real = getattr(owner, name)

    def step(*given: Any) -> Any:
        if bad(*given):
            raise ValueError("injected\nby the test")
        return real(*given)

    monkeypatch.setattr(owner, name, step)
    fields = {"task": ask(runtime).task, "options": ask(runtime).options}
    good, culprit = Request(input_ids=[5, 6, 7], **fields), Request(input_ids=[5, 9, 7], **fields)
    found = runtime.run([good, culprit, good], return_errors=True)
    assert isinstance(found[1], EdgePromptError)
    assert str(found[1]) == "the request failed: injected"
    assert not isinstance(found[0], Exception)
    assert not isinstance(found[2], Exception)
    with pytest.raises(EdgePromptError, match="the request failed: injected"):
        runtime.run([culprit])
    assert runtime.run([good])


def test_answers_of_many_that_come_one_by_one(load: Open) -> None:
    runtime = load()
    requests = [replace(ask(runtime), text=f"number {index} of the film") for index in range(12)]

    def plain(found: Any) -> Any:
        return found if isinstance(found, np.ndarray) else found.token_ids

    expected = [plain(found) for found in runtime.run(requests)]

    async def talk() -> list[Any]:
        late = asyncio.create_task(runtime.arun(requests))
        await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        return await runtime.arun(requests)

    for one, other in zip(expected, asyncio.run(talk()), strict=True):
        np.testing.assert_allclose(plain(other), one, atol=1e-5)


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_an_open_stream_stops_nobody(architecture: str, package_of: Callable[[str], Path]) -> None:
    """With room for one request, whoever comes second waited for the stream's reader, which could be itself."""
    options = replace(QUIET, max_batch=1, kv_budget=None if architecture == "decoder" else 300_000)
    with edgeprompt.load(package_of(architecture), options=options) as runtime:
        pieces = runtime.stream("the film", max_new_tokens=60, temperature=5.0, seed=1)
        next(pieces)
        assert runtime.generate("the film", max_new_tokens=5, timeout=20).token_ids
        assert len(list(pieces)) > 1
        pieces = runtime.stream("the film", max_new_tokens=60, temperature=5.0, seed=1)
        next(pieces)


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("closed", [True, False])
def test_the_end_of_a_stream_wakes_all_who_wait_for_it(
    architecture: str, closed: bool, package_of: Callable[[str], Path]
) -> None:
    with edgeprompt.load(package_of(architecture), options=QUIET) as runtime:
        pieces = runtime.stream("the film", max_new_tokens=60, temperature=5.0, seed=1)
        readers = [threading.Thread(target=lambda: list(pieces), daemon=True) for _ in range(3)]
        for reader in readers:
            reader.start()
        if closed:
            pieces.close()
        for reader in readers:
            reader.join(20)
            assert not reader.is_alive()


def test_beams_are_streamed_at_the_end(package_of: Callable[[str], Path]) -> None:
    with edgeprompt.load(package_of("encoder-decoder"), options=QUIET) as runtime:
        whole = runtime.generate("the film", num_beams=3, max_new_tokens=8).text
        assert "".join(runtime.stream("the film", num_beams=3, max_new_tokens=8)) == whole


def test_requests_of_an_encoder_decoder_join_and_leave_between_steps(
    package_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgeprompt.load(package_of("encoder-decoder"), options=replace(QUIET, max_batch=3)) as runtime:
        options = [GenerationOptions(max_new_tokens=n, temperature=5.0, seed=n) for n in (30, 4, 9, 6, 20)]
        requests = [Request("the film " * (n + 1), options=one) for n, one in enumerate(options)]
        alone = [runtime.run([one])[0].token_ids for one in requests]
        sizes: list[int] = []
        graphs: Any = runtime._engine._graphs
        real = graphs.step
        monkeypatch.setattr(graphs, "step", lambda state, ids: (sizes.append(len(ids)), real(state, ids))[1])
        jobs = [runtime.submit(one) for one in requests]
        assert [job.result(30).token_ids for job in jobs] == alone
        assert max(sizes) == 3
        assert len(sizes) < sum(map(len, alone)) - 5  # steps were shared


FORKED = """
import multiprocessing, os, sys, threading, time
import edgeprompt
from edgeprompt import EngineOptions, Request
options = EngineOptions(provider="cpu", threads=2)
runtime = edgeprompt.load(sys.argv[1], options=options)
task = "embed" if runtime.manifest.architecture == "encoder-only" else "generate"
request = Request("the film", task=task)
runtime.run([request])

def use(_=None):
    try:
        runtime.run([request])
    except edgeprompt.InputError as error:
        return str(error)

if sys.argv[2] == "exit":  # a child that only exits, exits
    child = os.fork()
    if not child:
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
elif sys.argv[2] == "use":
    child = os.fork()
    if not child:
        print(use(), flush=True)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
elif sys.argv[2] == "flight":  # what is in flight in the parent fails in the child
    jobs = [runtime.submit(request) for _ in range(200)]
    child = os.fork()
    if not child:
        found = {type(job.exception(5)).__name__ for job in jobs} - {"NoneType"}
        sys.exit(0 if found <= {"InputError"} else 1)
    assert os.waitpid(child, 0)[1] == 0
    jobs[-1].result(30)
    print("both")
elif sys.argv[2] == "held":  # what is at hand in the parent: encoded, prefilled or batched
    engine = runtime._engine
    if runtime.manifest.architecture == "decoder-only":
        owner, name = engine._lanes[0].graph, "prefill"
    elif runtime.manifest.architecture == "encoder-only":
        owner, name = type(engine._graph), "run"
    else:
        owner, name = engine._graphs, "encode"
    real, begun, go = getattr(owner, name), threading.Event(), threading.Event()

    def held(*given):
        begun.set()
        go.wait(30)
        return real(*given)

    setattr(owner, name, held)
    job = runtime.submit(Request("another film", task=task))
    assert begun.wait(20) and runtime.status().running == 1
    child = os.fork()
    if not child:
        sys.exit(0 if isinstance(job.exception(5), edgeprompt.InputError) else 1)
    assert os.waitpid(child, 0)[1] == 0
    go.set()
    job.result(30)
    print("both")
elif sys.argv[2] == "prompts":  # another thread of the parent holds the lock of its prompts
    lock, holding = runtime._prompts._lock, threading.Event()
    threading.Thread(target=lambda: (lock.acquire(), holding.set(), time.sleep(60)), daemon=True).start()
    assert holding.wait(20)
    child = os.fork()
    if not child:
        for call in (runtime.prompt, runtime.describe, runtime.remove_prompt, runtime.add_folder, runtime.add_prompt):
            try:
                call("nobody")
            except edgeprompt.InputError as error:
                assert "forked" in str(error), error
        print(runtime.status(), runtime.prompts)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
elif sys.argv[2] == "pool":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(*set(pool.map(use, range(4))))
elif sys.argv[2] == "load":  # gunicorn's preload: the master has one, each worker opens its own
    child = os.fork()
    if not child:
        with edgeprompt.load(sys.argv[1], options=options) as own:
            own.run([request])
        print("answered", flush=True)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
runtime.run([request])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exit", "7"),
        ("use", "before the process forked"),
        ("flight", "both"),
        ("held", "both"),
        ("prompts", "RuntimeStatus"),
        ("pool", "forked"),
        ("load", "answered"),
    ],
)
def test_forks(architecture: str, how: str, says: str, package_of: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(package_of(architecture)), how],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


@pytest.mark.parametrize("architecture", ["encoder", "encoder-decoder"])
def test_interpreter_exit_with_requests_in_flight(architecture: str, package_of: Callable[[str], Path]) -> None:
    code = (
        "import sys, edgeprompt\n"
        "from edgeprompt import Request\n"
        "runtime = edgeprompt.load(sys.argv[1], provider='cpu', threads=1)\n"
        "jobs = [runtime.submit(Request('a film ' * 10)) for _ in range(100)]\n"
        "print('leaving')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(package_of(architecture))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_a_callback_raises_ends_no_thread(load: Open, raised: type[BaseException]) -> None:
    def listener(*_: Any) -> None:
        raise raised("mine")

    runtime = load()
    generates = runtime.manifest.architecture != "encoder-only"
    request = Request("a text", task="generate" if generates else "embed")
    if generates:
        with pytest.raises(edgeprompt.InferenceError, match=r"on_text raised .*mine"):
            runtime.submit(request, listener).result(20)
    job = runtime.submit(request)
    job.add_done_callback(listener)
    beside = runtime.submit(request)
    job.result(20)
    beside.result(20)
    runtime.submit(request).result(20)


def test_a_callback_that_waits_for_the_runtime_is_told(load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load()
    begun, go = hold(runtime, monkeypatch)
    generates = runtime.manifest.architecture != "encoder-only"
    request = Request("a text", task="generate" if generates else "embed")
    told: list[str] = []

    def listener(*_: Any) -> None:
        for ask in (lambda: runtime.run([request]), lambda: runtime.submit(request).result(20)):
            with pytest.raises(InputError) as caught:
                ask()
            told.append(str(caught.value))

    job = runtime.submit(request)
    job.add_done_callback(listener)
    assert begun.wait(20)
    go.set()
    job.result(20)
    runtime.submit(request).result(20)
    assert len(told) == 2
    assert all("waits for the runtime on the thread that computes" in one for one in told)
