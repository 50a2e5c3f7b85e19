"""Clients that go away, prompts that come and go, and the end of the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import edgeprompt
from edgeprompt import PromptFile, save_prompt
from edgeprompt.package.folder import open_package
from edgeprompt.server.log import Log
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET, WORDS, hold, load_with_prompts
from tests.support.server import Running, serving

LONG = {"model": "story", "prompt": "a", "max_tokens": 200, "temperature": 5.0, "seed": 1}
CHECK = {"model": "words", "input": "the film"}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def idle(server: Running) -> bool:
    status = server.runtime.status()
    return (status.waiting, status.running, server.server._service._streams) == (0, 0, 0) and not (
        server.server._service._jobs
    )


def test_a_client_that_goes_away_cancels_its_request(decoder: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for streams in (False, True):
        with monkeypatch.context() as patch:
            begun, go = hold(decoder.runtime, patch)
            with pytest.raises(httpx.TimeoutException):  # and the connection is closed
                body = {**LONG, "stream": streams}
                with httpx.stream("POST", f"{decoder.url}/v1/completions", json=body, timeout=0.5) as found:
                    assert begun.wait(20)
                    found.read()
            until(lambda wanted=1 + streams: decoder.written.count('"status": 499') >= wanted)
            go.set()
            until(lambda: idle(decoder))
        last = decoder.log[-1]
        assert (last["status"], last["endpoint"]) == (499, "/v1/completions")
    assert "edgeprompt_cancelled_total 0.0" not in decoder.get("/metrics").text


def threads() -> int:
    """Threads of this process, without those of the servers' pools, which come as they are needed and stay."""
    return sum(not thread.name.startswith("edgeprompt-serve") for thread in threading.enumerate())


def disconnect(server: Running, count: int) -> None:
    """`count` streams, each left after its first events; nothing runs afterwards."""
    assert server.post("/v1/classify", CHECK).status_code == 200
    until(lambda: bool(server.log))  # the log's thread comes with its first event, and stays
    before = threads()
    for index in range(count):
        body = {**LONG, "stream": True, "n": 1 + index % 2, "seed": index}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as found:
            pieces = found.iter_lines()
            for _ in range(index % 4):
                next(pieces)
    until(lambda: idle(server))
    assert threads() <= before
    assert server.post("/v1/classify", CHECK).status_code == 200


def test_streams_that_are_left_leave_nothing_running(decoder: Running) -> None:
    disconnect(decoder, 30)


@pytest.mark.slow
def test_a_thousand_streams_that_are_left_leave_nothing_running(decoder: Running) -> None:
    disconnect(decoder, 1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "prompts"
    found.mkdir()
    return found


def test_prompts_come_change_and_go_with_their_files(tiny_llama_package: Path, folder: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        runtime.add_folder(folder)

        def put(seed: int, **fields: Any) -> PromptFile:
            prompt = make_prompt(runtime.manifest, "new", seed=seed, verbalizer=WORDS, **fields)
            save_prompt(prompt, folder / "new.safetensors")
            return prompt

        def ask() -> httpx.Response:
            return server.post("/v1/classify", {**CHECK, "model": "new"})

        with serving(runtime) as server, edgeprompt.load(tiny_llama_package, options=QUIET) as other:
            assert ask().status_code == 404
            for seed in (3, 4):
                other.add_prompt(put(seed))
                found = ask().json()["data"][0]
                assert found["scores"] == other.classify("the film", prompt="new").scores
            assert "new" in [one["id"] for one in server.get("/v1/models").json()["data"]]
            (folder / "new.safetensors").unlink()
            assert ask().status_code == 404
            assert [one["id"] for one in server.get("/v1/models").json()["data"]] == [runtime.manifest.base.name]
            (folder / "new.safetensors").write_bytes(b"no prompt")
            found = ask()
            assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_servable")
            assert str(folder) not in found.text
            assert str(folder) in server.written
            (folder / "new.safetensors").unlink()
            put(5)
            assert ask().status_code == 200


@pytest.fixture
def start(tiny_llama_package: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """`start(*arguments)`: `edgeprompt serve` as a process of its own, and its URL."""
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "log"

    def make(*arguments: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "edgeprompt", "serve", str(tiny_llama_package), "--port", "0"]
        with log.open("w") as file:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
            process = subprocess.Popen(
                [*command, "--threads", "1", *arguments], stderr=file, text=True, env=environment
            )
        started.append(process)
        until(lambda: '"listening"' in log.read_text() or process.poll() is not None, 60)
        events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        return process, next(event["url"] for event in events if event["event"] == "listening")

    yield make
    for process in started:
        process.kill()
        process.wait()


def test_the_process_ends_in_order(
    start: Callable[..., tuple[subprocess.Popen[str], str]], tiny_llama_package: Path, folder: Path, tmp_path: Path
) -> None:
    manifest = open_package(tiny_llama_package).manifest
    save_prompt(make_prompt(manifest, "story", seed=1), folder / "story.safetensors")
    save_prompt(make_prompt(manifest, "words", verbalizer=WORDS), folder / "words.safetensors")
    key = tmp_path / "keys"
    key.write_text("of-a-file\n", encoding="utf-8")
    process, url = start("--prompts", str(folder), "--api-key-file", str(key), EDGEPROMPT_API_KEY="of-the-environment")
    arguments = Path(f"/proc/{process.pid}/cmdline")
    if arguments.exists():
        assert b"of-a-file" not in arguments.read_bytes()
    for secret in ("of-a-file", "of-the-environment"):
        headers = {"Authorization": f"Bearer {secret}"}
        assert httpx.post(f"{url}/v1/classify", json=CHECK, headers=headers, timeout=60).status_code == 200
    body = {**LONG, "max_tokens": 100, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as found:
        pieces = found.iter_lines()
        next(pieces)
        process.send_signal(signal.SIGTERM)
        assert [line for line in pieces if line][-1] == "data: [DONE]"  # it was finished
    assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")][-2:] == [
        "request",
        "stopped",
    ]
    assert "of-a-file" not in log
    assert "of-the-environment" not in log


@pytest.mark.parametrize("reads", [True, False])
def test_a_log_that_nobody_reads_keeps_nobody_waiting(tiny_llama_package: Path, reads: bool) -> None:
    command = [sys.executable, "-m", "edgeprompt", "serve", str(tiny_llama_package), "--port", "0", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    try:
        url = next(json.loads(line)["url"] for line in process.stderr if line.startswith(b"{"))
        headers = {"X-Request-ID": "x" * 64}
        with httpx.Client(base_url=url, timeout=30) as client:  # a pipe holds 64 KiB
            for _ in range(600):
                assert client.get("/v1/models", headers=headers).status_code == 200
        process.send_signal(signal.SIGTERM)
        if reads:
            events = [json.loads(line) for line in process.stderr if line.startswith(b"{")]
            assert sum(event["event"] == "request" for event in events) == 600
            assert events[-1]["event"] == "stopped"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_the_log_cannot_hold_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprompt.server.log.WAITING", 10)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as file:
        log = Log(file=file)
        count = 0
        while log.flush(0.2):  # until the pipe is full
            for _ in range(10):
                log.write("event", number=(count := count + 1), text="x" * 1000)
        for _ in range(50):
            log.write("event", number=(count := count + 1))
        events = []
        while not events or events[-1]["event"] != "left_out":
            events.append(json.loads(reader.readline()))
    numbers = [event["number"] for event in events[:-1]]
    assert numbers == [*range(1, len(numbers) + 1)]
    assert len(numbers) + events[-1]["events"] == count


def test_a_log_whose_reader_has_gone_is_given_up() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        log = Log(file=file)
        os.close(read)
        for _ in range(3):
            log.write("event")
            assert log.flush(10)
        log.close()


def test_what_outlasts_the_grace_is_cancelled(tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_with_prompts(tiny_llama_package) as runtime:
        begun, go = hold(runtime, monkeypatch)
        with serving(runtime, grace=0.2) as server:
            body = {**LONG, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as found:
                assert begun.wait(20)
                server.server.stop()
                until(lambda: all(job._cancel_asked for job in server.server._service._jobs))
                go.set()
                (last,) = [line for line in found.iter_lines() if line][-1:]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
            server.thread.join(20)
            assert not server.thread.is_alive()


def test_while_it_stops_new_requests_are_turned_away(tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_with_prompts(tiny_llama_package) as runtime, serving(runtime) as server:
        server.server._service.stop()
        found = server.post("/v1/classify", CHECK)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "stopping")
        assert server.get("/health").status_code == 503
