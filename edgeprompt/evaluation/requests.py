"""Records of data as requests: fields from columns, answers batch by batch, errors by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprompt.errors import EdgePromptError

if TYPE_CHECKING:
    from edgeprompt.prompts.file import PromptFile
    from edgeprompt.request import Request, Result
    from edgeprompt.runtime import Runtime

T = TypeVar("T")

RECORDS_AT_ONCE = 64


def fields_of(record: Mapping[str, Any], column: str, prompt: PromptFile | None, where: str) -> dict[str, str]:
    """The texts of a record that a prompt's template asks for; without a prompt, the text alone.

    Args:
        record: one row of the data.
        column: the column that fills `{text}`.
        prompt: whose template; a tagger takes the column `tokens`, joined by spaces, where the data has one.
        where: what to call the row in messages.

    Raises:
        DataError: a column is missing or holds no text.
    """
    from edgeprompt.evaluation.cells import joined_words, text_of
    from edgeprompt.prompts.encoder_text import located_slot

    slots = ("text",) if prompt is None else prompt.template.slots
    words = (
        located_slot(prompt.template) if prompt is not None and prompt.task == "tag" and "tokens" in record else None
    )
    return {
        slot: joined_words(record, where)
        if slot == words
        else text_of(record, column if slot == "text" else slot, where)
        for slot in slots
    }


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
    found: list[Result] = []
    for (number, _), result in zip(requests, results, strict=True):
        if isinstance(result, EdgePromptError):
            raise type(result)(f"row {number}: {result}") from result
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
