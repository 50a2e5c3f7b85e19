"""Latency benchmarks of a package: `edgeprompt bench`. Needs the runtime install only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprompt.bench.comparison import compare
    from edgeprompt.bench.options import BenchOptions
    from edgeprompt.bench.report import Report, load_report
    from edgeprompt.bench.run import run_bench

__all__ = ["BenchOptions", "Report", "compare", "load_report", "run_bench"]

_HOMES = {
    "BenchOptions": "options",
    "Report": "report",
    "compare": "comparison",
    "load_report": "report",
    "run_bench": "run",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the worker, whose start is measured, is in this package and needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
