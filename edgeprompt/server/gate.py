"""In front of every request: its id, keys, the Host header, the server's end, and the log behind it."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from edgeprompt.server.failures import Failure, failure_of, stopping
from edgeprompt.server.log import Log, Stopwatch
from edgeprompt.server.metrics import Metrics

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/openapi.json")
"""What needs no key."""
CLIENT_GONE = 499
"""nginx' status for a client that went away; it stands in the log and in no answer."""
_IDENTITY = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys:
    """API keys, of which only hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def fit(self, key: bytes) -> bool:
        """Whether a key is one of them: the time says nothing about which, or how much of one was right."""
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, own) for own in self._digests) > 0  # no `any`: all are compared


@dataclass
class Record:
    """What the log says about one request; whoever answers it fills this in."""

    identity: str
    model: str | None = None
    """Only of a model that exists: what a client writes there may be anything."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    stream: bool | None = None
    gone: bool = False
    error: str | None = None
    text: Any = None
    endpoint: str = "unknown"


class Gate:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        hosts: frozenset[str] | None,
        log: Log,
        metrics: Metrics,
        endpoints: Iterable[str],
    ) -> None:
        """`hosts`: names that a Host header may hold, None: any. `endpoints`: paths that the log may show."""
        self._app, self._keys, self._hosts, self._log, self._metrics = app, keys, hosts, log, metrics
        self._endpoints = frozenset(endpoints)
        self.stopping = False
        """Whether new requests are turned away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        record = Record(asked if _IDENTITY.fullmatch(asked) else uuid.uuid4().hex)
        record.endpoint = self._endpoint(scope["path"])
        scope.setdefault("state", {})["record"] = record
        clock, status = Stopwatch(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", record.identity.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            failure = self._refusal(scope["path"], headers)
            if failure is None:
                await self._app(scope, receive, sending)
            else:
                record.error = failure.code
                await send_failure(failure, sending)
        except Exception as error:
            self._log.failed(record.identity, error)
            record.error = type(error).__name__
            if status == 0:
                await send_failure(failure_of(error), sending)
        finally:
            self._end(record, CLIENT_GONE if record.gone else status, clock())

    def _endpoint(self, path: str) -> str:
        if path in self._endpoints:
            return path
        return "/v1/models/{model}" if path.startswith("/v1/models/") else "unknown"

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> Failure | None:
        if self._hosts is not None and _host(headers.get(b"host", b"")) not in self._hosts:
            # A page of another site whose name was made to point here (DNS rebinding) would read the answers.
            return Failure(403, "this server answers to its own address only; ask it by that", code="wrong_host")
        if self.stopping and path != "/health":
            return stopping()
        if self._keys and path not in OPEN and not self._keys.fit(_key(headers.get(b"authorization", b""))):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            return Failure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None

    def _end(self, record: Record, status: int, seconds: float) -> None:
        self._metrics.requests.labels(record.endpoint, record.model or "", str(status)).inc()
        self._metrics.latency.labels(record.endpoint).observe(seconds)
        self._metrics.tokens.labels("input").inc(record.input_tokens or 0)
        self._metrics.tokens.labels("output").inc(record.output_tokens or 0)
        if record.gone:
            self._metrics.cancelled.inc()
        if record.endpoint in ("/health", "/metrics") and status == 200:
            return  # somebody asks every few seconds
        self._log.write(
            "request",
            id=record.identity,
            endpoint=record.endpoint,
            model=record.model,
            status=status,
            error=record.error,
            ms=round(1000 * seconds, 1),
            input_tokens=record.input_tokens,
            output_tokens=record.output_tokens,
            stream=record.stream,
            text=record.text if self._log.texts else None,
        )


async def send_failure(failure: Failure, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(failure.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **failure.headers}
    if failure.status == 413:  # the rest of the body is not read
        headers["connection"] = "close"
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _key(header: bytes) -> bytes:
    kind, _, key = header.partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


def _host(header: bytes) -> str:
    """The name in a Host header, without the port."""
    text = header.decode("latin-1").lower()
    return text[: text.find("]") + 1] if text.startswith("[") else text.partition(":")[0]
