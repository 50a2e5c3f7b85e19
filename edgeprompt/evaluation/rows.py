"""Rows of data as requests: fields from columns, answers batch by batch, errors by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprompt.errors import EdgePromptError

if TYPE_CHECKING:
    from edgeprompt.request import Request, Result
    from edgeprompt.runtime import Runtime

T = TypeVar("T")

ROWS_AT_ONCE = 64


def fields_of(row: Mapping[str, Any], column: str, slots: Sequence[str], number: int) -> dict[str, str]:
    """The slots' texts of a row; `column` fills `{text}`.

    Raises:
        DataError: a column is missing or holds no text.
    """
    from edgeprompt.evaluation.data import text_of

    return {slot: text_of(row, column if slot == "text" else slot, f"row {number}") for slot in slots}


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def answers(runtime: Runtime, requests: Sequence[tuple[int, Request]]) -> list[Result]:
    """Answer one mixed batch; a row that fails is named by its number.

    Raises:
        EdgePromptError: of the first row that failed.
    """
    results = runtime.run([request for _, request in requests], return_errors=True)
    for (number, _), result in zip(requests, results, strict=True):
        if isinstance(result, EdgePromptError):
            raise type(result)(f"row {number}: {result}") from result
        if isinstance(result, BaseException):
            raise result
    return list(results)
