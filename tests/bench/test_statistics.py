import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from edgeprompt.bench.statistics import mann_whitney, percentile, summarise


def test_summary_of_known_samples():
    found = summarise([4.0, 1.0, 3.0, 2.0])
    assert (found.n, found.min, found.mean, found.p50) == (4, 1.0, 2.5, 2.5)
    assert found.stddev == pytest.approx(1.2909944487)
    assert found.p99 == pytest.approx(3.97)


def test_one_sample_has_no_spread():
    found = summarise([7.0])
    assert (found.stddev, found.p50, found.p99) == (0.0, 7.0, 7.0)


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 95, 99, 100])
def test_percentiles_are_numpys(percent: int):
    values = np.random.default_rng(percent).normal(size=23)
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent))


@pytest.mark.parametrize(("n", "m"), [(1, 3), (5, 5), (4, 9), (3, 20), (20, 20)])
def test_exact_p_value_is_scipys(n: int, m: int):
    random = np.random.default_rng(n * m)
    first, second = random.normal(size=n), random.normal(0.7, size=m)
    assert mann_whitney(first, second) == pytest.approx(mannwhitneyu(first, second, method="exact").pvalue)


def test_p_value_with_ties_is_scipys():
    first, second = [1, 2, 3, 3, 4, 5], [3, 5, 6, 7, 7]
    assert mann_whitney(first, second) == pytest.approx(mannwhitneyu(first, second, method="asymptotic").pvalue)


def test_large_sets_use_the_normal_approximation():
    random = np.random.default_rng(0)
    first, second = random.normal(size=80), random.normal(0.3, size=90)
    assert mann_whitney(first, second) == pytest.approx(mannwhitneyu(first, second, method="asymptotic").pvalue)


def test_equal_samples_do_not_differ():
    assert mann_whitney([5.0] * 6, [5.0] * 6) == 1.0
