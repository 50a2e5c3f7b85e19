"""Summaries of samples, and whether two sets of samples differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprompt.errors import MissingDependencyError


@dataclass(frozen=True)
class Summary:
    """What is reported of a set of samples, in their unit. `stddev` is the sample's (n - 1), 0 for one sample."""

    n: int
    min: float
    mean: float
    stddev: float
    p50: float
    p90: float
    p95: float
    p99: float


def summarise(samples: Sequence[float]) -> Summary:
    """Summary of at least one sample; percentiles are linear between neighbours."""
    values = np.asarray(samples, np.float64)
    return Summary(
        len(values),
        float(values.min()),
        float(values.mean()),
        float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        *(float(value) for value in np.percentile(values, (50, 90, 95, 99))),
    )


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value that both sets come from one distribution (`scipy.stats.mannwhitneyu`).

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    return float(require_scipy().mannwhitneyu(first, second).pvalue)


def require_scipy() -> Any:
    """`scipy.stats`.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingDependencyError("comparing results needs scipy; run: pip install 'edgeprompt[plot]'") from error
    return stats
