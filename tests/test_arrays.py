from __future__ import annotations

import numpy as np
import pytest

from edgeprompt.arrays import largest, log_softmax, require_finite, softmax
from edgeprompt.errors import EdgePromptError

BAD = (np.nan, np.inf)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_and_its_logarithm(dtype: type) -> None:
    values = np.array([[1.0, 2.0, -np.inf], [1000.0, 1000.0, 999.0]], dtype)
    expected = np.exp(values - values.max(1, keepdims=True)).astype(np.float64)
    expected /= expected.sum(1, keepdims=True)
    assert softmax(values).dtype == log_softmax(values).dtype == dtype
    assert softmax(values) == pytest.approx(expected, abs=1e-6)
    assert np.exp(log_softmax(values)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", [largest, log_softmax, softmax, require_finite])
def test_what_is_not_finite_is_no_answer(bad: float, function: object) -> None:
    values = np.zeros((2, 3), np.float32)
    values[1, 2] = bad
    with pytest.raises(EdgePromptError, match="NaN or infinite"):
        function(values)  # type: ignore[operator]
