import numpy as np
import pytest

from edgeprompt.bench.statistics import mann_whitney, summarise


def test_summary_of_known_samples():
    found = summarise([4.0, 1.0, 3.0, 2.0])
    assert (found.n, found.min, found.mean, found.p50) == (4, 1.0, 2.5, 2.5)
    assert found.stddev == pytest.approx(1.2909944487)
    assert found.p99 == pytest.approx(3.97)


def test_one_sample_has_no_spread():
    found = summarise([7.0])
    assert (found.stddev, found.p50, found.p99) == (0.0, 7.0, 7.0)


def test_samples_that_differ_beyond_noise():
    random = np.random.default_rng(0)
    assert mann_whitney(random.normal(size=40), random.normal(2.0, size=40)) < 1e-6


def test_the_exact_p_value_of_few_samples():
    assert mann_whitney([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(2 / 20)  # of 20 orders, two are as extreme


def test_equal_samples_do_not_differ():
    assert mann_whitney([5.0] * 6, [5.0] * 6) == 1.0
