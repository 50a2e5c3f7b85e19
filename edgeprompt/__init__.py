"""One frozen language model on a device, many tasks: soft prompts served from one quantised ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprompt.decoding.detokenizer import TextPiece, TextStream
    from edgeprompt.engines.scheduler import Job
    from edgeprompt.errors import (
        BaseMismatchError,
        CapacityError,
        DataError,
        EdgePromptError,
        ExportError,
        HubError,
        InferenceError,
        InputError,
        MissingDependencyError,
        OtherWeightsError,
        OutputError,
        PackageError,
        PromptChangedError,
        PromptFileError,
        PromptNotFoundError,
        ProviderError,
        QueueFullError,
        RequestCancelledError,
        RequestTimeoutError,
        SourceError,
        TemplateError,
        TuningError,
        UnsupportedError,
        ValidationError,
    )
    from edgeprompt.loading import load
    from edgeprompt.options import EngineOptions
    from edgeprompt.package.manifest import Manifest
    from edgeprompt.prompts.file import PromptFile, load_prompt, save_prompt
    from edgeprompt.prompts.golden import GoldenCheck
    from edgeprompt.request import (
        Answer,
        ChatKeywords,
        Classification,
        Embedding,
        Generation,
        GenerationKeywords,
        GenerationOptions,
        Ids,
        Message,
        Request,
        RequestKeywords,
        Result,
        RuntimeStatus,
        Span,
        Tagging,
        Text,
        Timings,
    )
    from edgeprompt.runtime import Runtime

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BaseMismatchError",
    "CapacityError",
    "ChatKeywords",
    "Classification",
    "DataError",
    "EdgePromptError",
    "Embedding",
    "EngineOptions",
    "ExportError",
    "Generation",
    "GenerationKeywords",
    "GenerationOptions",
    "GoldenCheck",
    "HubError",
    "Ids",
    "InferenceError",
    "InputError",
    "Job",
    "Manifest",
    "Message",
    "MissingDependencyError",
    "OtherWeightsError",
    "OutputError",
    "PackageError",
    "PromptChangedError",
    "PromptFile",
    "PromptFileError",
    "PromptNotFoundError",
    "ProviderError",
    "QueueFullError",
    "Request",
    "RequestCancelledError",
    "RequestKeywords",
    "RequestTimeoutError",
    "Result",
    "Runtime",
    "RuntimeStatus",
    "SourceError",
    "Span",
    "Tagging",
    "TemplateError",
    "Text",
    "TextPiece",
    "TextStream",
    "Timings",
    "TuningError",
    "UnsupportedError",
    "ValidationError",
    "load",
    "load_prompt",
    "save_prompt",
]

_MODULES = (
    "errors",
    "options",
    "loading",
    "request",
    "package.manifest",
    "prompts.file",
    "prompts.golden",
    "engines.scheduler",
    "decoding.detokenizer",
    "runtime",
)
"""Where the public names are defined, the lightest first."""


def __getattr__(name: str) -> Any:
    """Import on first use: numpy and the rest take a tenth of a second, and `--help` needs none of it."""
    if name in __all__:
        from importlib import import_module

        for module in _MODULES:
            found = vars(import_module(f"{__name__}.{module}")).get(name)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
