"""Notification triage: three prompts on one graph: how a message feels, where it is from, and how it reads written out.

    python triage.py PACKAGE                 messages from stdin, one a line; latencies at the end
    python triage.py PACKAGE --port 8000     a service: POST /triage {"text": "..."}, GET /latency

Needs `pip install 'edgeprompt[cpu]'` and nothing else.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import threading
import time
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import edgeprompt
from edgeprompt import CapacityError, EdgePromptError, GenerationOptions, Request, RequestTimeoutError, Runtime

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
LABELS = ("sentiment", "source")
"""Prompts that classify; the third, `restore`, writes the message out with capitals and punctuation."""
TIMEOUT = 30.0
"""Seconds after which a task is given up."""
WRITTEN = GenerationOptions(max_new_tokens=96, stop=("\n",))
LARGEST_BODY = 64 << 10
"""Bytes of a request to the service."""


class Latencies:
    """The last thousand milliseconds of each task, and of a whole message."""

    def __init__(self) -> None:
        self._samples: dict[str, collections.deque[float]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._samples.setdefault(name, collections.deque(maxlen=1000)).append(1000 * seconds)

    def summary(self) -> dict[str, dict[str, float]]:
        with self._lock:
            ordered = {name: sorted(samples) for name, samples in self._samples.items()}
        return {
            name: {"n": len(values), "p50": _percentile(values, 50), "p95": _percentile(values, 95)}
            for name, values in ordered.items()
        }


def _percentile(ordered: list[float], percent: int) -> float:
    return round(ordered[min(len(ordered) * percent // 100, len(ordered) - 1)], 1)


class Triage:
    """The three tasks on one runtime. Any thread may call it; what comes together runs in one batch."""

    def __init__(self, runtime: Runtime, prompts: Path = PROMPTS) -> None:
        self._runtime = runtime
        for name in (*LABELS, "restore"):
            runtime.add_prompt(prompts / f"{name}.safetensors", name=name)
        self.latencies = Latencies()

    def __call__(self, text: str) -> dict[str, Any]:
        """Labels, the text written out, and what to do with it.

        Raises:
            EdgePromptError: too long, too late, or too many messages at once.
        """
        started = time.perf_counter()
        requests = {name: Request(text, name, timeout=TIMEOUT) for name in LABELS}
        requests["restore"] = Request(text, "restore", options=WRITTEN, timeout=TIMEOUT)
        jobs = {name: self._runtime.submit(request) for name, request in requests.items()}
        found = {name: job.result() for name, job in jobs.items()}
        for name, result in found.items():
            self.latencies.add(name, result.timings.total)
        self.latencies.add("message", time.perf_counter() - started)
        labels = {name: found[name].label for name in LABELS}
        return {
            "action": action(**labels),
            **{name: {"label": found[name].label, "score": found[name].scores[found[name].label]} for name in LABELS},
            "written": found["restore"].text.strip(),
            "milliseconds": {name: round(1000 * result.timings.total, 1) for name, result in found.items()},
        }


def action(sentiment: str, source: str) -> str:
    """What to do with a message: complaints first, news on the side, the rest when there is time."""
    if source == "news":
        return "digest"
    return "answer now" if sentiment == "negative" and source in ("product", "tweets") else "later"


def read_lines(triage: Triage, lines: Iterable[str]) -> None:
    """Triage each line; a line that fails says why and the others go on."""
    for line in lines:
        if not line.strip():
            continue
        try:
            found = triage(line.strip())
        except EdgePromptError as error:
            print(f"not triaged: {error}", file=sys.stderr)
            continue
        labels = ", ".join(f"{name} {found[name]['label']} {found[name]['score']:.0%}" for name in LABELS)
        print(f"{found['action']:<10}  {labels}\n            {found['written']}", flush=True)
    print_table(triage.latencies.summary())


def print_table(summary: dict[str, dict[str, float]]) -> None:
    print(f"\n{'milliseconds':<12}{'p50':>9}{'p95':>9}{'n':>6}")
    for name, values in summary.items():
        print(f"{name:<12}{values['p50']:>9.1f}{values['p95']:>9.1f}{values['n']:>6}")


def make_server(triage: Triage, port: int) -> ThreadingHTTPServer:
    """The service on this machine's own address; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/triage":
                self._answer(HTTPStatus.NOT_FOUND, {"error": "POST /triage or GET /latency"})
                return
            try:
                size = int(self.headers.get("Content-Length", 0))
                if not 0 < size <= LARGEST_BODY:
                    raise ValueError(f"the body has {size} bytes; 1 to {LARGEST_BODY} are allowed")
                body = json.loads(self.rfile.read(size))
                if not isinstance(body, dict) or not isinstance(body.get("text"), str):
                    raise ValueError('send {"text": "..."}')
                self._answer(HTTPStatus.OK, triage(body["text"]))
            except CapacityError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)})
            except RequestTimeoutError as error:
                self._answer(HTTPStatus.GATEWAY_TIMEOUT, {"error": str(error)})
            except ValueError as error:  # of JSON, and of texts that the runtime refuses
                self._answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            except EdgePromptError as error:
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

        def do_GET(self) -> None:
            if self.path == "/latency":
                self._answer(HTTPStatus.OK, triage.latencies.summary())
            else:
                self._answer(HTTPStatus.NOT_FOUND, {"error": "POST /triage or GET /latency"})

        def _answer(self, status: HTTPStatus, content: Any) -> None:
            data = json.dumps(content, ensure_ascii=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Quiet: what counts is in /latency."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="folder with the three prompt files")
    parser.add_argument("--port", type=int, help="serve HTTP on this port of 127.0.0.1")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    with edgeprompt.load(options.package, threads=options.threads) as runtime:
        triage = Triage(runtime, options.prompts)
        if options.port is None:
            read_lines(triage, sys.stdin)
            return
        server = make_server(triage, options.port)
        print(f"POST http://127.0.0.1:{server.server_port}/triage, GET /latency; Ctrl-C ends", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_table(triage.latencies.summary())
        finally:
            server.server_close()


if __name__ == "__main__":
    main()
