"""A real server on loopback, in a thread of this process."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from edgeprompt import Runtime
from edgeprompt.server.log import Log
from edgeprompt.server.options import ServerOptions
from edgeprompt.server.process import Server, open_socket


@dataclass
class Running:
    """A server that runs."""

    url: str
    runtime: Runtime
    server: Server
    thread: threading.Thread
    buffer: io.StringIO
    writer: Log

    @property
    def written(self) -> str:
        """What the log has."""
        assert self.writer.flush()
        return self.buffer.getvalue()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The events so far."""
        return [json.loads(line) for line in self.written.splitlines()]

    def logged(self, **fields: Any) -> dict[str, Any]:
        """The last event that has these fields; it is written after the answer was sent, so it is waited for."""
        end = time.monotonic() + 20
        while True:
            found = [one for one in self.log if fields.items() <= one.items()]
            if found:
                return found[-1]
            assert time.monotonic() < end, f"no event with {fields}"
            time.sleep(0.005)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST a JSON body, in ASCII: it may hold what UTF-8 cannot."""
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, content=json.dumps(body), headers=headers, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET."""
        return httpx.get(self.url + path, timeout=60, **options)


@contextmanager
def serving(runtime: Runtime, **options: Any) -> Iterator[Running]:
    """Serve a runtime on a free port; stopped at the end."""
    given = ServerOptions(port=0, **{"grace": 5.0, **options})
    written, started = io.StringIO(), threading.Event()
    log = Log(texts=given.log_texts, file=written)
    server = Server(runtime, given, open_socket(given), log=log, ready=lambda _: started.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(30)
    try:
        yield Running(server.url, runtime, server, thread, written, log)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
