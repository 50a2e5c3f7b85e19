"""A server as a process: the socket, uvicorn, signals, and an end in order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from edgeprompt.errors import InputError, MissingDependencyError
from edgeprompt.runtime import Runtime
from edgeprompt.server.log import Log
from edgeprompt.server.options import ServerOptions

LAST = 5.0
"""Seconds that requests get to say that they were cancelled."""
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


def open_socket(options: ServerOptions) -> socket.socket:
    """Bind the address; nobody is answered yet.

    Raises:
        InputError: it cannot be bound, or is not this machine's own and there is neither a key nor
            `allow_unauthenticated`.
    """
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} is no address of this machine ({error}); use 127.0.0.1") from error
    if not ipaddress.ip_address(address[0]).is_loopback and not options.api_keys and not options.allow_unauthenticated:
        raise InputError(
            f"{host} can be reached from other machines, and no key is set; give --api-key-file, or "
            "--allow-unauthenticated if anybody who reaches it may use it"
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; another --port may be free"
        ) from error
    return bound


class Server:
    """Answers requests on a bound socket."""

    def __init__(
        self, runtime: Runtime, options: ServerOptions, bound: socket.socket, *, log: Log, ready: Callable[[str], None]
    ) -> None:
        """Make one; `run` starts it.

        Args:
            runtime: what answers.
            options: limits.
            bound: of `open_socket`.
            log: where events go.
            ready: gets the server's URL once it answers.

        Raises:
            MissingDependencyError: the extra `serve` is not installed.
        """
        uvicorn = import_server()
        from edgeprompt.server import app

        self._options, self._bound, self._log, self._ready = options, bound, log, ready
        address = bound.getsockname()
        shown = f"[{address[0]}]" if bound.family == socket.AF_INET6 else address[0]
        self.url = f"http://{shown}:{address[1]}"
        # With a key, a page of another site cannot ask; without one, it must not read by way of a name of its own.
        local = ipaddress.ip_address(address[0]).is_loopback
        hosts = _LOCAL | {shown, options.host.lower()} if local and not options.api_keys else None
        self._service = app.Service(runtime, options, log=log, hosts=hosts)
        config = uvicorn.Config(
            self._service.app,
            loop="asyncio",
            http=_protocol(app.READ_TIMEOUT),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=options.max_connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(options.grace + LAST)),
        )
        self._server = uvicorn.Server(config)
        # Ours: uvicorn's handlers would end the process by the signal in the end.
        self._server.capture_signals = contextlib.nullcontext
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = 0

    def run(self) -> None:
        """Answer until `stop`, or until the process is told to stop (SIGTERM, Ctrl-C) if this is its main thread."""
        try:
            asyncio.run(self._run())
        finally:
            self._service.close()
        self._log.write("stopped")
        self._log.close()

    def stop(self, why: str = "asked") -> None:
        """Take no more requests; those in flight may end within `grace`. Again: cancel them now. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._stop, why)

    def _stop(self, why: str) -> None:
        assert self._loop is not None
        self._told += 1
        self._service.stop()
        self._server.should_exit = True
        if self._told == 1:
            self._log.write("stopping", why=why, grace=self._options.grace)
            self._loop.call_later(self._options.grace, self._service.cancel)
        else:
            self._service.cancel()
            self._server.force_exit = True

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()

        async def tell() -> None:
            while not self._server.started:
                await asyncio.sleep(0.01)
            self._ready(self.url)

        with _signals(lambda number: self.stop(signal.Signals(number).name)):
            telling = asyncio.ensure_future(tell())
            try:
                await self._server.serve(sockets=[self._bound])
            finally:
                telling.cancel()


def _protocol(seconds: float) -> Any:
    """uvicorn's protocol, but a connection is closed that brings no head of a request in so many seconds.

    uvicorn itself closes only those that had an answer; the others would count as connections for ever.
    """
    from uvicorn.protocols.http import auto

    base: Any = auto.AutoHTTPProtocol

    class Protocol(base):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            if self._timer is not None:
                self._timer.cancel()

        @property
        def _idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            if self._idle:
                self._timer = self._timer or self.loop.call_later(seconds, self._end)
            elif self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _end(self) -> None:
            self._timer = None
            if self._idle:
                self.transport.close()

    return Protocol


@contextlib.contextmanager
def _signals(stop: Callable[[int], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, _: stop(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def import_server() -> Any:
    """uvicorn, where all that a server needs is there.

    Raises:
        MissingDependencyError: names the install command.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError(
            f"edgeprompt serve needs {error.name!r}, which is not installed: pip install 'edgeprompt[serve]'"
        ) from error
    return uvicorn
