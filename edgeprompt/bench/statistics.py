"""Summaries of samples, and whether two sets of samples differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


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
    """Summary of at least one sample."""
    ordered = sorted(samples)
    return Summary(
        n=len(ordered),
        min=ordered[0],
        mean=statistics.fmean(ordered),
        stddev=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of sorted samples, linear between neighbours (numpy's default)."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value that both sets come from one distribution.

    Mann and Whitney 1947, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other":
    exact by recursion for small sets without ties, else the normal approximation with correction for ties and
    continuity.
    """
    n, m = len(first), len(second)
    both = sorted([*((value, 0) for value in first), *((value, 1) for value in second)])
    rank, ties, rank_sum = 1, 0, 0.0
    for _, group in groupby(both, key=lambda item: item[0]):
        members = list(group)
        size = len(members)
        rank_sum += sum(1 for _, side in members if side == 0) * (rank + (size - 1) / 2)
        ties += size**3 - size
        rank += size
    u = rank_sum - n * (n + 1) / 2
    u = min(u, n * m - u)
    total = n + m
    if not ties and n * m <= 400:
        return min(1.0, 2 * sum(_arrangements(n, m)[: int(u) + 1]) / math.comb(total, n))
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance == 0:
        return 1.0
    z = (n * m / 2 - u - 0.5) / math.sqrt(variance)
    return min(1.0, 2 * (1 - statistics.NormalDist().cdf(max(0.0, z))))


def _arrangements(n: int, m: int) -> list[int]:
    """How many orders of n and m samples have U = 0, 1, ... n * m (coefficients of the Gaussian binomial)."""
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):  # times (1 - q^(m+i))
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):  # divided by (1 - q^i)
            counts[u] += counts[u - i]
    return counts
