"""Everything edgeprompt raises on purpose.

Each kind also inherits the standard exception that callers already catch. A message is one line: it names the value
that was wrong, what was allowed, and what to do.
"""


class EdgePromptError(Exception):
    """Base of all errors that edgeprompt raises on purpose."""

    def __str__(self) -> str:
        """The message itself, also for kinds whose standard parent (`KeyError`) would show its repr."""
        return str(self.args[0]) if self.args else type(self).__name__


class PromptFileError(EdgePromptError, ValueError):
    """A prompt file is broken, hostile, or breaks the format."""


class PromptChangedError(PromptFileError):
    """The file of a prompt in a folder was replaced while a request waited; asked again, it uses the new one."""


class PackageError(EdgePromptError, ValueError):
    """An exported package is broken, incomplete, or of another contract version."""


class BaseMismatchError(EdgePromptError, ValueError):
    """A prompt was made for another base model, tokenizer or geometry."""


class OtherWeightsError(BaseMismatchError):
    """A prompt was tuned for other weights of the base, too far from the package's."""


class TemplateError(EdgePromptError, ValueError):
    """A template does not parse, or does not fit its prompt."""


class InputError(EdgePromptError, ValueError):
    """What the caller passed cannot be used (too long, an id out of range, a bad option)."""


class OutputError(InputError, OSError):
    """An output cannot be written where it was asked for; `strerror` says why."""


class DataError(EdgePromptError, ValueError):
    """A data file is missing, empty, or lacks what the task needs."""


class SourceError(EdgePromptError, ValueError):
    """A foreign checkpoint or base model is missing, unknown or unreadable."""


class UnsupportedError(EdgePromptError, NotImplementedError):
    """A combination that edgeprompt does not support; the message says why, and what to use instead."""


class PromptNotFoundError(EdgePromptError, KeyError):
    """No prompt of that name is loaded."""


class ProviderError(EdgePromptError, RuntimeError):
    """An execution provider is not available, or failed to start."""


class CapacityError(EdgePromptError, RuntimeError):
    """A memory or queue budget would be exceeded; the message names the limit."""


class QueueFullError(CapacityError):
    """As many requests wait as `max_queue` allows; the same request may be accepted later."""


class RequestCancelledError(EdgePromptError, RuntimeError):
    """The request was cancelled, or the runtime was closed, before it finished."""


class RequestTimeoutError(EdgePromptError, TimeoutError):
    """The request's deadline passed between two steps."""


class InferenceError(EdgePromptError, RuntimeError):
    """A graph failed on a request, or an unexpected error ended the request."""


class ExportError(EdgePromptError, RuntimeError):
    """An export failed; nothing was written."""


class ValidationError(EdgePromptError, RuntimeError):
    """A package does not compute what its base computes."""


class TuningError(EdgePromptError, RuntimeError):
    """Tuning could not continue."""


class HubError(EdgePromptError, RuntimeError):
    """Something of the Hugging Face Hub is not there, not allowed, not reachable, or came damaged."""


class MissingDependencyError(EdgePromptError, ImportError):
    """An optional dependency is not installed; the message has the install command."""
