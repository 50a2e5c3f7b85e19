"""Exports a frozen language model to ONNX once, with the soft prompt exposed as an input tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.choose import export_best
    from exporters.convert import convert_prompt
    from exporters.export import ExportReport, export_model, validate_package

__all__ = ["ExportReport", "convert_prompt", "export_best", "export_model", "validate_package"]

_HOMES = {
    "ExportReport": "exporters.export",
    "convert_prompt": "exporters.convert",
    "export_best": "exporters.choose",
    "export_model": "exporters.export",
    "validate_package": "exporters.export",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and a caller may need none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
