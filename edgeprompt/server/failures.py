"""What a client is told when something fails, in OpenAI's form, and with which status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeprompt.errors import (
    BaseMismatchError,
    CapacityError,
    EdgePromptError,
    InferenceError,
    InputError,
    MissingDependencyError,
    OtherWeightsError,
    PackageError,
    PromptChangedError,
    PromptFileError,
    PromptNotFoundError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    TemplateError,
    UnsupportedError,
)

INVALID = "invalid_request_error"
RETRY_AFTER = 1
"""Seconds after which a client may try again when the server was full, or a prompt was being replaced."""


@dataclass
class Failure(Exception):  # noqa: N818  (an answer, as starlette's HTTPException)
    """An answer that is no result: its status, and what the client is told."""

    status: int
    message: str
    kind: str = INVALID
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's object for errors."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def busy(message: str) -> Failure:
    """The server is full: try again later."""
    return Failure(429, message, "rate_limit_error", "queue_full", headers={"Retry-After": str(RETRY_AFTER)})


def not_found(model: str) -> Failure:
    """There is no such model."""
    return Failure(
        404, f"the model {model[:256]!r} does not exist; GET /v1/models lists those that do", code="model_not_found",
        param="model",
    )  # fmt: skip


def stopping() -> Failure:
    """The server is told to stop."""
    return Failure(503, "the server is stopping", "server_error", "stopping", headers={"Retry-After": "5"})


def failure_of(error: BaseException, model: str = "") -> Failure:
    """What to tell a client about an error; one that nobody foresaw is told as such, its words go to the log."""
    match error:
        case Failure():
            return error
        case PromptNotFoundError():
            return not_found(model)
        case QueueFullError():
            return busy(str(error))
        case PromptChangedError():
            message = f"the prompt file of model {model!r} was replaced while the request waited; ask again"
            again = {"Retry-After": str(RETRY_AFTER)}
            return Failure(503, message, "server_error", "prompt_replaced", "model", again)
        case PromptFileError() | OtherWeightsError():  # the message names the server's paths
            message = f"the prompt file of model {model!r} cannot be served here; the server's log says why"
            return Failure(404, message, code="model_not_servable", param="model")
        case BaseMismatchError():
            message = f"the prompt file of model {model!r} cannot be served here: {error}"
            return Failure(404, message, code="model_not_servable", param="model")
        case RequestTimeoutError():
            return Failure(504, str(error), "server_error", "timeout")
        case RequestCancelledError():
            return stopping()
        case UnsupportedError():
            return Failure(400, str(error), code="unsupported")
        case InputError() | TemplateError() | CapacityError():
            return Failure(400, str(error), code="invalid_value")
        case PackageError():  # of those, only the chat template reads what a client sends
            return Failure(400, "the package's chat template cannot render this conversation", code="invalid_value")
        case InferenceError() | MissingDependencyError() | EdgePromptError():
            return Failure(500, "the request failed; the server's log says why", "server_error", "failed")
    return Failure(
        500, "an error that nobody foresaw; the server's log has its place", "server_error", "internal_error"
    )
