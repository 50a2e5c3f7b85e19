"""Prompt tuning with PEFT: the only part of the package that imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeprompt.tuning.options import TuneOptions

if TYPE_CHECKING:
    from edgeprompt.tuning.tuner import TuneResult, tune

__all__ = ["TuneOptions", "TuneResult", "tune"]


def __getattr__(name: str) -> Any:
    """Import `tune` on first use: it needs torch, transformers and peft."""
    if name not in ("tune", "TuneResult"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from edgeprompt.tuning import tuner
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("edgeprompt", ""):
            raise
        from edgeprompt.errors import MissingDependencyError

        raise MissingDependencyError(f"tuning needs {error.name}: pip install 'edgeprompt[tune]'") from error
    return getattr(tuner, name)
