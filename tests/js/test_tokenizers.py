"""The npm package's tokenizers are exact with Python's: ids, offsets, text, on fuzzed and real texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.js_tokenizers import write_cases


def _check(ask: Callable[..., Any], files: list[Path], least_texts: int) -> None:
    found = ask("tokenizers", files=[str(file) for file in files])
    assert len(found) == len(files) > 10
    for file, one in zip(files, found, strict=True):
        assert one["wrong"] == 0, (file.stem, one["first"])
        assert one["texts"] >= least_texts


def _given(smollm2_package: Path, minilm_folder: Path) -> dict[str, Path]:
    return {"smollm2": smollm2_package / "tokenizer.json", "minilm": minilm_folder / "tokenizer.json"}


def test_no_difference_to_python(
    ask: Callable[..., Any], smollm2_package: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    _check(ask, write_cases(tmp_path, 250, _given(smollm2_package, minilm_folder)), 250)


@pytest.mark.slow
def test_no_difference_on_ten_thousand_texts_and_every_code_point(
    ask: Callable[..., Any], smollm2_package: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    for file in write_cases(tmp_path, 10_000, _given(smollm2_package, minilm_folder)):
        (found,) = ask("tokenizers", files=[str(file)])
        assert found["wrong"] == 0, (file.stem, found["first"])
        assert found["texts"] >= 10_000
        assert found["codes"] == 0x110000 - 0x800
