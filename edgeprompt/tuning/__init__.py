"""Prompt tuning with PEFT: the only part of the package that imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprompt.tuning.options import Distillation, TuneOptions

if TYPE_CHECKING:
    from edgeprompt.tuning.multitask import tune_tasks
    from edgeprompt.tuning.runs import TuneResult
    from edgeprompt.tuning.tuner import tune

__all__ = ["Distillation", "TuneOptions", "TuneResult", "tune", "tune_tasks"]


def __getattr__(name: str) -> Any:
    """Import the functions on first use: they need torch, transformers and peft."""
    if name not in ("tune", "tune_tasks", "TuneResult"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from edgeprompt.tuning import multitask, runs, tuner
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("edgeprompt", ""):
            raise
        from edgeprompt.errors import MissingDependencyError

        raise MissingDependencyError(f"tuning needs {error.name}: pip install 'edgeprompt[tune]'") from error
    home = {"tune_tasks": multitask, "TuneResult": runs}.get(name, tuner)
    return getattr(home, name)
