from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt import CapacityError, EngineOptions, Request, RequestCancelledError, RequestTimeoutError, Runtime
from edgeprompt.engines.scheduler import Job, Scheduler
from edgeprompt.request import GenerationOptions
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

Load = Callable[..., Runtime]


@pytest.fixture
def load(tiny_llama_package: Path) -> Iterator[Load]:
    opened: list[Runtime] = []

    def make(**options: Any) -> Runtime:
        opened.append(edgeprompt.load(tiny_llama_package, options=replace(QUIET, **options)))
        return opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


def endless(text: str = "the film", tokens: int = 200, **fields: Any) -> Request:
    """A request that takes `tokens` steps whatever the model says: the end token is no choice."""
    return Request(
        text, task="generate", options=GenerationOptions(max_new_tokens=tokens, temperature=5, seed=1), **fields
    )


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runtime], threading.Event]:
    """Holds decode steps of a runtime until the returned event is set; the graph is the real one."""

    def hold(runtime: Runtime) -> threading.Event:
        graph, go = graph_of(runtime), threading.Event()
        real = graph.decode

        def decode(*arguments: Any) -> Any:
            go.wait(20)
            return real(*arguments)

        monkeypatch.setattr(graph, "decode", decode)
        return go

    return hold


def graph_of(runtime: Runtime) -> Any:
    return runtime._engine._lanes[0].graph


def rows_of(runtime: Runtime) -> list[Any]:
    return runtime._engine._lanes[0]._rows


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_rows_join_and_leave_between_steps(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load()
    sizes: list[int] = []
    real = graph_of(runtime).decode
    monkeypatch.setattr(
        graph_of(runtime), "decode", lambda ids, lengths: (sizes.append(len(ids)), real(ids, lengths))[1]
    )
    requests = [Request("the film", task="generate", options=GenerationOptions(max_new_tokens=n)) for n in (40, 30, 5)]
    alone = [runtime.run([request])[0].token_ids for request in requests]
    sizes.clear()
    assert [result.token_ids for result in runtime.run(requests)] == alone
    assert max(sizes) == 3
    assert sizes[-1] == 1
    assert len(sizes) < sum(len(ids) for ids in alone) - 3  # steps were shared


def test_cancel_while_running_and_while_waiting(load: Load, slow: Any) -> None:
    runtime = load(max_batch=1)
    go = slow(runtime)
    running, waiting, last = runtime.submit(endless()), runtime.submit(endless()), runtime.submit(endless(tokens=2))
    until(lambda: len(rows_of(runtime)) == 1)
    assert running.cancel()
    assert waiting.cancel()
    go.set()
    for job in (running, waiting):
        with pytest.raises(RequestCancelledError, match="cancelled"):
            job.result(20)
    assert len(last.result(20).token_ids) <= 2
    assert not last.cancel()


def test_timeout_fails_the_late_request_alone(load: Load, slow: Any) -> None:
    runtime = load()
    go = slow(runtime)
    late, other = runtime.submit(endless(timeout=0.05)), runtime.submit(endless(tokens=3))
    until(lambda: len(rows_of(runtime)) >= 1)
    time.sleep(0.1)
    go.set()
    with pytest.raises(RequestTimeoutError, match="timeout"):
        late.result(20)
    assert other.result(20).finish_reason in ("length", "eos")


def test_a_row_that_fails_in_a_batch_fails_alone(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load()
    graph = graph_of(runtime)
    marked = {123}

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(first: Any, second: Any, *rest: Any) -> Any:
            lengths = rest if rest else second
            if any(length in marked for length in lengths):
                raise RuntimeError("injected")
            return real(first, second, *rest)

        return step

    monkeypatch.setattr(graph, "decode", failing(graph.decode))
    monkeypatch.setattr(graph, "decode_one", failing(graph.decode_one))
    requests = [
        endless(tokens=30),
        Request(input_ids=[7] * 115, task="generate", options=endless(tokens=30).options),
        endless("a", 30),
    ]
    good = [runtime.run([requests[0]])[0].token_ids, runtime.run([requests[2]])[0].token_ids]
    results = runtime.run(requests, return_errors=True)
    assert isinstance(results[1], RuntimeError)
    assert [results[0].token_ids, results[2].token_ids] == good
    with pytest.raises(RuntimeError, match="injected"):
        runtime.run(requests)


def test_a_prefill_that_fails_fails_alone(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load()
    graph = graph_of(runtime)
    real = graph.prefill

    def prefill(row: int, ids: Any, *rest: Any) -> Any:
        if 9 in ids:
            raise RuntimeError("injected")
        return real(row, ids, *rest)

    monkeypatch.setattr(graph, "prefill", prefill)
    results = runtime.run(
        [endless(tokens=4), Request(input_ids=[9], task="generate"), endless(tokens=4)], return_errors=True
    )
    assert isinstance(results[1], RuntimeError)
    assert results[0].token_ids == results[2].token_ids


def test_full_queue_refuses_submit_and_makes_run_wait(load: Load, slow: Any) -> None:
    runtime = load(max_batch=1, max_queue=2)
    go = slow(runtime)
    jobs = [runtime.submit(endless(tokens=2))]
    until(lambda: len(rows_of(runtime)) == 1)
    jobs += [runtime.submit(endless(tokens=2)) for _ in range(2)]
    with pytest.raises(CapacityError, match="2 requests are waiting"):
        runtime.submit(endless(tokens=2))
    threading.Timer(0.05, go.set).start()
    assert len(runtime.run([endless(tokens=2)] * 6)) == 6
    assert not wait(jobs, 20).not_done


def test_waiting_for_room_ends_with_the_timeout(load: Load, slow: Any) -> None:
    runtime = load(max_batch=1, max_queue=1)
    go = slow(runtime)
    jobs = [runtime.submit(endless(tokens=2))]
    until(lambda: len(rows_of(runtime)) == 1)
    jobs.append(runtime.submit(endless(tokens=2)))
    with pytest.raises(RequestTimeoutError):
        runtime.run([endless(tokens=2, timeout=0.05)])
    assert not go.is_set()
    go.set()
    assert not wait(jobs, 20).not_done


def test_kv_budget_bounds_the_batch(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    position = 2 * 2 * 2 * 16 * 4
    runtime = load(kv_budget=2 * 256 * position)
    sizes: list[int] = []
    real = graph_of(runtime).decode
    monkeypatch.setattr(
        graph_of(runtime), "decode", lambda ids, lengths: (sizes.append(len(ids)), real(ids, lengths))[1]
    )
    results = runtime.run([endless(tokens=10) for _ in range(8)])
    assert len({result.token_ids for result in results}) == 1
    assert max(sizes) == 2
    assert graph_of(runtime)._cache._buffer.nbytes <= 2 * 256 * position


@pytest.mark.parametrize("limit", [{"max_batch": 0}, {"max_queue": 0}, {"kv_budget": 0}, {"prefix_budget": -1}])
def test_limits_under_which_nothing_runs_are_refused(limit: dict[str, int]) -> None:
    with pytest.raises(edgeprompt.InputError, match=f"{next(iter(limit))} is"):
        EngineOptions(**limit)


def test_close_fails_what_is_in_flight(load: Load, slow: Any) -> None:
    runtime = load(max_batch=2)
    go = slow(runtime)
    jobs = [runtime.submit(endless()) for _ in range(5)]
    until(lambda: len(rows_of(runtime)) >= 1)
    threading.Timer(0.05, go.set).start()
    runtime.close()
    for job in jobs:
        with pytest.raises((RequestCancelledError, CancelledError)):
            job.result(20)
    with pytest.raises(edgeprompt.InputError, match="closed"):
        runtime.generate("a")
    runtime.close()


def test_closing_while_others_wait_for_room_wakes_them(load: Load, slow: Any) -> None:
    runtime = load(max_batch=1, max_queue=1)
    go = slow(runtime)
    errors: list[BaseException] = []

    def client() -> None:
        try:
            runtime.run([endless()] * 4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(rows_of(runtime)) == 1)
    threading.Timer(0.05, go.set).start()
    runtime.close()
    for thread in threads:
        thread.join(20)
    assert [type(error) for error in errors] == [RequestCancelledError] * 3


def test_stream_closed_early_cancels_its_request(load: Load) -> None:
    runtime = load()
    pieces = runtime.stream("the film", max_new_tokens=200, temperature=5, seed=1)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    until(lambda: not rows_of(runtime))


def test_prompts_come_and_go_while_requests_run(load: Load) -> None:
    runtime = load()
    stop = threading.Event()
    prompts = [make_prompt(runtime.manifest, f"p{i}", seed=i) for i in range(4)]
    runtime.add_prompt(prompts[0])
    expected = runtime.generate("the film", prompt="p0", max_new_tokens=8).token_ids

    def change() -> None:
        while not stop.is_set():
            for prompt in prompts[1:]:
                runtime.add_prompt(prompt)
            for prompt in prompts[1:]:
                runtime.remove_prompt(prompt.name)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            assert runtime.generate("the film", prompt="p0", max_new_tokens=8).token_ids == expected
    finally:
        stop.set()
        thread.join(20)


def test_interpreter_exit_with_requests_in_flight(tiny_llama_package: Path) -> None:
    code = (
        "import sys, edgeprompt\n"
        "from edgeprompt import Request\n"
        "from edgeprompt.request import GenerationOptions\n"
        "runtime = edgeprompt.load(sys.argv[1], provider='cpu', threads=1)\n"
        "options = GenerationOptions(max_new_tokens=200, temperature=5.0, seed=1)\n"
        "jobs = [runtime.submit(Request('a film', task='generate', options=options)) for _ in range(50)]\n"
        "pieces = runtime.stream('a film', max_new_tokens=200)\n"
        "next(pieces)\n"
        "print('leaving')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama_package)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_a_lane_that_breaks_behind_a_job_that_ended_leaves_nobody_waiting() -> None:
    class Lane:
        running: list[Job] = []  # noqa: RUF012

        def take(self, waiting: Any) -> bool:
            self.running = [*self.running, *waiting]
            waiting.clear()
            return True

        def step(self) -> None:
            self.running[0].finish()
            raise SystemError("injected")

        def drop(self, job: Job, error: BaseException) -> None:
            job.fail(error)

        def idle(self) -> None:
            pass

    jobs = [Job(None, lambda: "answer") for _ in range(3)]
    scheduler = Scheduler([Lane()], max_queue=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        scheduler.submit(jobs)
        assert jobs[0].result(20) == "answer"
        for job in jobs[1:]:
            with pytest.raises(RequestCancelledError, match="injected"):
                job.result(20)
        scheduler.close()


@pytest.mark.parametrize("started", [False, True])
def test_a_signal_while_the_first_thread_starts_breaks_nothing(started: bool) -> None:
    class Lane:
        running: list[Job] = []  # noqa: RUF012

        def take(self, waiting: Any) -> bool:
            self.running = [*waiting]
            waiting.clear()
            return True

        def step(self) -> None:
            for job in self.running:
                job.finish()
            self.running = []

        def drop(self, job: Job, error: BaseException) -> None:
            job.fail(error)

        def idle(self) -> None:
            pass

    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if started:
            start(thread)
        raise KeyboardInterrupt

    def broken() -> tuple[Scheduler, Job]:
        scheduler, job = Scheduler([Lane(), Lane()], max_queue=8), Job(None, lambda: "answer")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                scheduler.submit([job])
        return scheduler, job

    scheduler, job = broken()
    scheduler.close()
    assert job.done()
    if not started:
        with pytest.raises(RequestCancelledError, match="closed"):
            job.result()

    scheduler, job = broken()
    later = Job(None, lambda: "another")
    scheduler.submit([later])
    assert (job.result(20), later.result(20)) == ("answer", "another")
    scheduler.close()
