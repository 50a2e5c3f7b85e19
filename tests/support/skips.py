"""What is said where tests cannot run here."""

from __future__ import annotations

import os

import pytest


def missing(what: str) -> None:
    """Say clearly that the tests of the npm package were not run; where everything must run (CI), fail."""
    message = f"{what}; the tests of the npm package were not run (make js sets it up)"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
