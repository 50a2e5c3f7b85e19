"""Records of data as requests: fields from columns, answers batch by batch, errors by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprompt.errors import DataError, EdgePromptError
from edgeprompt.evaluation.formats import BrokenRecord
from edgeprompt.evaluation.rows import Answered
from edgeprompt.request import GenerationOptions, Request

if TYPE_CHECKING:
    from edgeprompt.prompts.file import PromptFile
    from edgeprompt.request import Result
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


@dataclass(frozen=True)
class Questions:
    """What is asked about every record of a data file."""

    prompts: tuple[str, ...] = ()
    """Names of prompts: each is asked, or only the one that `prompt_column` names. None: the base."""
    folders: bool = False
    """Whether `prompt_column` may name prompts beyond these."""
    text_column: str = "text"
    prompt_column: str | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions)
    chat: bool = False
    truncate: bool = False

    def of(
        self, record: Mapping[str, Any], where: str, find: Callable[[str], PromptFile]
    ) -> Iterator[tuple[str, Request]]:
        """The requests of a record, each with the text to show for it.

        Args:
            record: one row of the data.
            where: what to call it in messages, as "row 3".
            find: a prompt by name.

        Raises:
            DataError: a column is missing, or names no prompt, or the line is no record.
            PromptNotFoundError: no folder holds the prompt.
        """
        from edgeprompt.evaluation.cells import text_of

        if isinstance(record, BrokenRecord):
            raise DataError(record.error)
        chosen: tuple[str | None, ...] = self.prompts or (None,)
        if self.prompt_column:
            name = text_of(record, self.prompt_column, where)
            if name not in self.prompts and not self.folders:
                raise DataError(f"{where} names prompt {name!r}; given with --prompt: {', '.join(self.prompts)}")
            chosen = (name,)
        for pick in chosen:
            fields = fields_of(record, self.text_column, None if pick is None else find(pick), where)
            text = fields["text"] if pick is None else fields
            request = Request(text=text, prompt=pick, options=self.options, chat=self.chat, truncate=self.truncate)
            yield " ".join(fields.values()), request


def check_columns(
    questions: Questions,
    columns: Collection[str],
    find: Callable[[str], PromptFile],
    source: str,
    *,
    names: Collection[str] | None = None,
) -> None:
    """Refuse what would fail for every record: a column that none has, or prompts' names of which none is known.

    Args:
        questions: what is asked.
        columns: what some record has.
        find: a prompt by name.
        source: what to call the data in messages.
        names: all that the column of prompts' names holds; None: not known.

    Raises:
        DataError: names the column.
    """
    from edgeprompt.prompts.encoder_text import located_slot

    has = f"{source} has no column %r%s; it has: {', '.join(columns) or 'none'}"
    asked: dict[str, PromptFile] = {name: find(name) for name in questions.prompts}
    column = questions.prompt_column
    if column:
        if column not in columns:
            raise DataError(has % (column, " (the names of prompts)"))
        if names is None:
            return
        if not questions.folders:
            asked = {name: prompt for name, prompt in asked.items() if name in names}
        wrong = ""
        for wanted in names if questions.folders and not asked else ():
            try:
                asked = {wanted: find(wanted)}
                break
            except EdgePromptError as error:
                wrong = wrong or f"; the first: {error}"
        if names and not asked:
            held = ", ".join(map(repr, islice(names, 3)))
            known = f"; given with --prompt: {', '.join(questions.prompts)}" if questions.prompts else wrong
            raise DataError(f"column {column!r} of {source} names no prompt that there is: it holds {held}{known}")
        if questions.folders:
            return
    each: Iterable[tuple[str | None, PromptFile | None]] = asked.items() or ((None, None),)
    for name, prompt in each:
        tagged = located_slot(prompt.template) if prompt and prompt.task == "tag" and "tokens" in columns else None
        for slot in prompt.template.slots if prompt else ("text",):
            wanted = questions.text_column if slot == "text" else slot
            if slot != tagged and wanted not in columns:
                raise DataError(has % (wanted, f", which prompt {name!r} asks for" if name else ""))


def answer(
    runtime: Runtime, questions: Questions, records: Sequence[tuple[str, Mapping[str, Any]]]
) -> Iterator[tuple[int, Answered, EdgePromptError | None]]:
    """Answer some records as one mixed batch.

    Args:
        runtime: has the prompts.
        questions: what is asked.
        records: each with what to call it in messages.

    Yields:
        The index of a record, and its answer; where there is none, why.
    """
    asked: list[tuple[int, str, Request | EdgePromptError]] = []
    for index, (where, record) in enumerate(records):
        try:
            asked += [(index, *found) for found in list(questions.of(record, where, runtime.describe))]
        except EdgePromptError as error:
            asked.append((index, "", error))
    wanted = [request for *_, request in asked if isinstance(request, Request)]
    results = iter(runtime.run(wanted, return_errors=True))
    for index, text, request in asked:
        record = records[index][1]
        result = next(results) if isinstance(request, Request) else request
        prompt = request.prompt if isinstance(request, Request) else None
        if isinstance(result, EdgePromptError):
            yield index, Answered(record, text, prompt, None), result
        elif isinstance(result, BaseException):
            raise result
        else:
            yield index, Answered(record, text, prompt, result), None


def told(where: str, error: EdgePromptError) -> str:
    """The message of an error, with the record that it is about."""
    return str(error) if str(error).startswith(where) else f"{where}: {error}"


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
