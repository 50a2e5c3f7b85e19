"""One frozen language model on a device, many tasks: soft prompts served from one quantised ONNX graph."""

from edgeprompt.engines import EngineOptions
from edgeprompt.errors import (
    BaseMismatchError,
    CapacityError,
    DataError,
    EdgePromptError,
    ExportError,
    InputError,
    MissingDependencyError,
    PackageError,
    PromptFileError,
    PromptNotFoundError,
    ProviderError,
    RequestCancelledError,
    RequestTimeoutError,
    SourceError,
    TemplateError,
    TuningError,
    UnsupportedError,
    ValidationError,
)
from edgeprompt.golden import GoldenCheck
from edgeprompt.prompt_file import PromptFile, load_prompt, save_prompt
from edgeprompt.request import (
    Answer,
    Classification,
    Generation,
    GenerationOptions,
    Request,
    Span,
    Tagging,
    Timings,
)
from edgeprompt.runtime import Runtime, load

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BaseMismatchError",
    "CapacityError",
    "Classification",
    "DataError",
    "EdgePromptError",
    "EngineOptions",
    "ExportError",
    "Generation",
    "GenerationOptions",
    "GoldenCheck",
    "InputError",
    "MissingDependencyError",
    "PackageError",
    "PromptFile",
    "PromptFileError",
    "PromptNotFoundError",
    "ProviderError",
    "Request",
    "RequestCancelledError",
    "RequestTimeoutError",
    "Runtime",
    "SourceError",
    "Span",
    "Tagging",
    "TemplateError",
    "Timings",
    "TuningError",
    "UnsupportedError",
    "ValidationError",
    "load",
    "load_prompt",
    "save_prompt",
]
