"""Limits and settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprompt.errors import InputError


@dataclass(frozen=True)
class ServerOptions:
    """Limits and settings of one server; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them lets a client in; none lets everybody in."""
    allow_unauthenticated: bool = False
    """Whether another address than this machine's own may be bound without a key."""
    grace: float = 30.0
    """How long requests in flight may take when the server is told to stop; then they are cancelled."""
    timeout: float = 600.0
    """How long a request may take, waiting included."""
    max_body: int = 4 << 20
    max_text: int = 100_000
    """Most characters of one text."""
    max_inputs: int = 256
    """Most texts of one request, each choice of `n` counted."""
    max_streams: int = 64
    """Most streams at a time."""
    max_connections: int = 512
    log_texts: bool = False
    """Whether the log holds what was asked and answered."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be served.

        Raises:
            InputError: names the limit, or says that a key is no key; a key is never shown.
        """
        for name in ("max_body", "max_text", "max_inputs", "max_streams", "max_connections"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.timeout < float("inf") or not 0 <= self.grace < float("inf"):
            raise InputError(
                f"timeout is {self.timeout} and grace {self.grace}; they must be seconds, above and from 0"
            )
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise InputError("an API key is empty, or has characters that a header cannot hold; use printable ASCII")
