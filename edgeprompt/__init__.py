"""One frozen language model on a device, many tasks: soft prompts served from one quantised ONNX graph."""

from edgeprompt.errors import EdgePromptError
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

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Classification",
    "EdgePromptError",
    "Generation",
    "GenerationOptions",
    "PromptFile",
    "Request",
    "Span",
    "Tagging",
    "Timings",
    "load_prompt",
    "save_prompt",
]
