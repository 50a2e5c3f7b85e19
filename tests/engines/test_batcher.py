from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import CapacityError, EngineOptions, Request, RequestCancelledError, RequestTimeoutError
from edgeprompt.engines.batcher import WORKERS, Batcher


class Slow:
    """Holds batches until told; answers each request with its text."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        self.sizes.append(len(requests))
        self.go.wait(20)
        return [ValueError("bad") if request.text == "bad" else request.text for request in requests]

    def busy(self, batcher: Batcher) -> None:
        """Give every worker a batch."""
        for _ in range(WORKERS):
            before = len(self.sizes)
            batcher.submit(Request("first"))
            while len(self.sizes) == before:
                time.sleep(0.001)


def test_what_gathers_is_one_batch_and_a_bad_row_fails_alone() -> None:
    slow = Slow()
    batcher = Batcher(slow, max_batch=4, max_queue=10)
    slow.busy(batcher)
    futures = [batcher.submit(Request(text)) for text in ("a", "bad", "b", "c", "d")]
    assert futures[3].cancel()
    slow.go.set()
    assert [futures[index].result(20) for index in (0, 2, 4)] == ["a", "b", "d"]
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(20)
    with pytest.raises(CancelledError):
        futures[3].result(20)
    assert sorted(slow.sizes) == [1, 1, 1, 3]
    batcher.close()


def test_limits_timeouts_and_closing() -> None:
    slow = Slow()
    batcher = Batcher(slow, max_batch=1, max_queue=2)
    slow.busy(batcher)
    late, waiting = batcher.submit(Request("a", timeout=0.001)), batcher.submit(Request("b"))
    with pytest.raises(CapacityError, match="2 requests are waiting"):
        batcher.submit(Request("c"))
    time.sleep(0.01)
    slow.go.set()
    with pytest.raises(RequestTimeoutError):
        late.result(20)
    assert waiting.result(20) == "b"
    slow.go.clear()
    slow.busy(batcher)
    waiting = batcher.submit(Request("d"))
    batcher.close()
    with pytest.raises(RequestCancelledError):
        waiting.result(20)
    with pytest.raises(RequestCancelledError):
        batcher.submit(Request("e"))
    slow.go.set()


def test_an_encoder_answers_many_asyncio_requests(minilm_package: Path) -> None:
    texts = [f"sentence number {index}" for index in range(40)]
    with edgeprompt.load(minilm_package, options=EngineOptions(provider="cpu", threads=1, spinning=False)) as runtime:
        expected = runtime.embed(texts)

        async def ask() -> list[Any]:
            late = asyncio.create_task(runtime.arun([Request(text, task="embed") for text in texts]))
            await asyncio.sleep(0)
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
            return await runtime.arun([Request(text, task="embed") for text in texts])

        found = np.stack(asyncio.run(ask()))
    assert np.abs(found - expected).max() < 1e-5


def test_interpreter_exit_with_requests_in_flight(minilm_package: Path) -> None:
    code = (
        "import sys, edgeprompt\n"
        "from edgeprompt import Request\n"
        "runtime = edgeprompt.load(sys.argv[1], provider='cpu', threads=1)\n"
        "jobs = [runtime.submit(Request('a film ' * 60, task='embed')) for _ in range(100)]\n"
        "print('leaving')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(minilm_package)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
