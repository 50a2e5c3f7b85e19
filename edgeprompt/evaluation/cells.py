"""What a record's cells say: texts, labels, numbers, tags and answers.

One reading for training, evaluation and `run`, so that a text scores the same everywhere.
"""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from edgeprompt.errors import DataError
from edgeprompt.evaluation.formats import Record

_BOM = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_NO_VALUE = ("nan", "NaN", "NaT", "<NA>", "#N/A")
"""How pandas, numpy and Excel write nothing; the last word on others ("None", "null") is the data's own."""
_FLAGS = {"0", "1", "0.0", "1.0", "true", "false"}
_FLAG_ROW = re.compile(r"[01](?:[\s,;|]+[01])+")
"""A 0 or 1 for each label, in one cell."""
_NUMPY = re.compile(r"(?:array|tensor)\(.*\)|\[[\s\d.+-]+\]", re.DOTALL)
"""An array as numpy or torch prints it: `[1 0 1]`, `array([1, 0, 1])`."""
_PRINTED = re.compile(r"""b(?:'.*'|".*")|(?:np|numpy|torch|datetime|decimal)\.\w+\(.*\)|Decimal\(.*\)""", re.DOTALL)
"""A value as Python prints it: `b'good'`, `np.str_('good')`."""
_WIDTHLESS = re.compile("[\ufe00-\ufe0f]")
"""Variation selectors: how a sign is drawn."""
TAG_COLUMNS = ("tags", "ner_tags")
"""Where the tags of a text stand; the first that the data has."""


def text_of(record: Record, column: str, where: str) -> str:
    """A record's cell as text: line ends become "\\n", a byte order mark in front goes, numbers are written out.

    Args:
        record: one row of the data.
        column: which cell.
        where: what to call the row in messages, as "row 3".

    Raises:
        DataError: the cell is missing or empty (null), a list or an object, or holds NUL or half a surrogate pair.
    """
    value = value_of(record, column, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: column {column!r} holds {value}, which is no text; leave the row out")
    if isinstance(value, (bool, int, float)):
        return _digits(value, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}, text is needed")
    return clean(value, f"{where}: column {column!r}")


def _digits(value: float, column: str, where: str) -> str:
    try:
        return str(value)
    except ValueError as error:  # Python writes integers of 4,300 digits at most
        raise DataError(f"{where}: column {column!r} holds a number of too many digits") from error


def clean(text: str, where: str) -> str:
    """A text as it was meant: see `text_of`.

    Raises:
        DataError: it holds NUL, or half of a surrogate pair.
    """
    if "\0" in text:
        raise DataError(f"{where} holds NUL (U+0000), which no text has; save the data as UTF-8")
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"{where} holds half of a surrogate pair (U+D800 to U+DFFF), which is no text")
    text = text.removeprefix(_BOM)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def value_of(record: Record, column: str, where: str) -> Any:
    """A cell as it is; numpy's values as Python's.

    Raises:
        DataError: there is no such column, or nothing in it (null, NaN).
    """
    if column not in record:
        raise DataError(f"{where} has no column {column!r}; it has {', '.join(map(str, record)) or 'none'}")
    value = record[column]
    if type(value).__module__ == "numpy":
        small = type(value).__name__ in ("float16", "float32")  # as the digits that were meant: 0.1, not 0.10000000149
        value = float(str(value)) if small else value.tolist()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where} has nothing in column {column!r} ({value!r}); fill it in, or leave the row out")
    return value


def label_of(record: Record, column: str, where: str) -> str:
    """A record's label: white space around it goes, and a whole number is written without a fraction (1.0 is "1").

    Raises:
        DataError: there is none, or it is a list.
    """
    value = value_of(record, column, where)
    if isinstance(value, (list, tuple)):
        raise DataError(
            f"{where}: column {column!r} holds a list, one label is needed; several labels need --problem-type "
            "multi_label (encoder-only bases) in all rows"
        )
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{where}: column {column!r} holds {value}, which is no label")
        value = int(value) if value.is_integer() else value
    label = text_of({column: value}, column, where).strip()
    if not label:
        raise DataError(f"{where} has nothing in column {column!r}, so its label is unknown; leave the row out")
    if label in _NO_VALUE:
        raise DataError(
            f"{where}: label {label!r} is how programs write a cell with nothing in it; fill it in, leave the row out, "
            "or give the class another name"
        )
    if _FLAG_ROW.fullmatch(label):
        raise DataError(
            f"{where}: label {label[:60]!r} reads like a 0 or 1 for each label; write the names of the labels that "
            "hold, with commas between them, and give --problem-type multi_label"
        )
    if _PRINTED.fullmatch(label):
        raise DataError(
            f"{where}: label {label[:60]!r} is a value as Python prints it; write the name itself (decode bytes)"
        )
    if _is_list(label):
        raise DataError(
            f"{where}: label {label[:60]!r} is a list written as text; use .jsonl with real lists, or labels with "
            "commas between them and --problem-type multi_label"
        )
    return label


def target_of(record: Record, column: str, where: str) -> str:
    """The text that is to be generated.

    Raises:
        DataError: as `text_of`, or the cell is empty or holds what programs write for nothing ("nan").
    """
    target = text_of(record, column, where)
    if not target.strip():
        raise DataError(
            f"{where} has nothing in column {column!r}, and an answer without a word is none; fill it in, or leave the "
            "row out"
        )
    if target.strip() in _NO_VALUE:
        raise DataError(
            f"{where}: column {column!r} holds {target.strip()!r}, which is how programs write a cell with nothing in "
            "it; fill it in, or leave the row out"
        )
    return target


def labels_of(record: Record, column: str, where: str) -> list[str]:
    """Several labels of one record: a list of names, or a text with commas.

    Raises:
        DataError: numbers, which may be ids or a 0 or 1 for each label, also as text; or a list written as text.
    """
    value = value_of(record, column, where)
    if isinstance(value, (list, tuple)):
        wrong = next((one for one in value if not isinstance(one, str)), None)
        if wrong is not None:
            raise DataError(
                f"{where}: column {column!r} holds {str(value)[:60]}, and what its values stand for is not known "
                '(ids, or a 0 or 1 for each label?); write the names of the labels, as ["drama", "war"]'
            )
        found = [label_of({column: one}, column, where) for one in value]
    elif isinstance(value, str):
        if _is_list(value.strip()):
            return [label_of({column: value}, column, where)]  # which says what is wrong with it
        if other := re.search("[;|]", value) if "," not in value else None:
            raise DataError(
                f"{where}: column {column!r} holds {value[:60]!r}, which reads like several labels with {other[0]!r} "
                "between them; write commas, or a list in .jsonl"
            )
        cells = [label.strip() for label in clean(value, where).split(",") if label.strip()]
        found = [label_of({column: label}, column, where) for label in cells]
    else:
        found = [label_of(record, column, where)]
    if len(found) > 1 and {label.lower() for label in found} <= _FLAGS:
        raise DataError(
            f"{where}: column {column!r} holds {str(value)[:60]!r}, which reads like a 0 or 1 for each label; write "
            'the names of the labels that hold, as ["drama", "war"]'
        )
    return list(dict.fromkeys(found))


def number_of(record: Record, column: str, where: str) -> float:
    """A record's number.

    Raises:
        DataError: no finite number.
    """
    value = value_of(record, column, where)
    try:  # Python reads 1_000 as 1000
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {repr(value)[:60]} in column {column!r} is no finite number")
    return number


def tagged_words(record: Record, where: str) -> tuple[list[str], list[str]]:
    """Words and their tags from the columns `tokens` and `tags` (or `ner_tags`): lists, or texts split at white space.

    Raises:
        DataError: not one tag for each word, a word that is empty or holds white space, or tags that are ids without
            names.
    """
    tag_column = next((name for name in TAG_COLUMNS if name in record), TAG_COLUMNS[0])
    words = _list_of(record, "tokens", where)
    tags = _list_of(record, tag_column, where)
    if len(words) != len(tags) or not words:
        raise DataError(f"{where} has {len(words)} tokens and {len(tags)} tags; each token needs one tag")
    unnamed = next((tag for tag in tags if not isinstance(tag, str) or _NUMBER.fullmatch(tag)), None)
    if unnamed is not None:
        raise DataError(
            f"{where}: column {tag_column!r} holds {unnamed!r}, an id without a name; write the names, as B-PER"
        )
    broken = next((word for word in words if not isinstance(word, str) or len(word.split()) != 1), None)
    if broken is not None:
        raise DataError(f"{where}: token {broken!r} is empty or holds white space; words are what stands between it")
    return [clean(word, where) for word in words], [label_of({tag_column: tag}, tag_column, where) for tag in tags]


def joined_words(record: Record, where: str) -> str:
    """The words of a record to be tagged, joined by spaces.

    Raises:
        DataError: as `tagged_words`, of the words alone.
    """
    words = _list_of(record, "tokens", where)
    return " ".join(tagged_words({"tokens": words, "tags": ["O"] * len(words)}, where)[0])


def _list_of(record: Record, column: str, where: str) -> list[Any]:
    value = value_of(record, column, where)
    if isinstance(value, (list, tuple)):
        return list(value)
    text = text_of(record, column, where).strip()
    if _is_list(text):
        raise DataError(f"{where}: column {column!r} holds a list written as text ({text[:60]}); use .jsonl")
    return text.split()


def given_answer(record: Record, context: str, where: str) -> tuple[str, int]:
    """The answer and where it starts: SQuAD's `answers` (texts and starts), or a column `answer`; "" for none.

    `context` is the text of the column `context` (`text_of`).

    Raises:
        DataError: the answer does not stand in the context.
    """
    if answers := _squad_answers(record):
        texts, starts = _several(answers.get("text")), _several(answers.get("answer_start"))
        if not texts:
            return "", 0
        answer = clean(str(texts[0]), f"{where}: the answer")
        first = starts[0] if starts else -1
        if not isinstance(first, (int, float)) or first < -1 or first % 1 != 0:  # of infinity and NaN it is NaN
            raise DataError(f"{where}: answer_start holds {first!r}, a number of characters is needed")
        start = int(first)
        raw = record.get("context")
        if start > 0 and isinstance(raw, str) and raw != context:  # it counts characters of the text as it was
            start = len(clean(raw[:start], where))
    else:
        answer, start = text_of(record, "answer", where), -1
    if not answer:
        return "", 0
    if record.get("is_impossible") is True:
        raise DataError(
            f"{where} says that it has no answer (is_impossible), and gives {answer[:60]!r}; keep one of both"
        )
    start = context.find(answer) if start < 0 else start
    if start < 0 or context[start : start + len(answer)] != answer:
        raise DataError(f"{where}: the answer {answer[:60]!r} does not stand in the context")
    return answer, start


def given_answers(record: Record, context: str, where: str) -> tuple[str, ...]:
    """All answers that count as right: the texts of SQuAD's `answers`, or the one of a column `answer`; "" for none.

    Raises:
        DataError: as `given_answer`, of the first.
    """
    first, _ = given_answer(record, context, where)
    texts = _several(_squad_answers(record).get("text"))
    return tuple(dict.fromkeys([first, *(clean(str(text), f"{where}: an answer") for text in texts)]))


def _squad_answers(record: Record) -> Mapping[str, Any]:
    """SQuAD's `answers` as texts and starts, whichever way they are nested; empty where the record has none."""
    answers: Any = record.get("answers")
    if type(answers).__module__ == "numpy":
        answers = answers.tolist()
    if isinstance(answers, (list, tuple)) and all(isinstance(one, Mapping) for one in answers):
        answers = {key: [one[key] for one in answers if key in one] for key in ("text", "answer_start")}
    return answers if isinstance(answers, Mapping) else {}


def _several(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, (str, int)) else list(value)


def label_key(label: str) -> str:
    """What labels that are meant to be the same have in common: Unicode form, white space, the exact value of a number,
    no signs without width, "true" and "false" in small letters."""
    plain = " ".join(unicodedata.normalize("NFKC", label).split())
    if not plain.isascii():
        plain = "".join(sign for sign in _WIDTHLESS.sub("", plain) if unicodedata.category(sign) != "Cf")
    if plain.lower() in ("true", "false"):
        return plain.lower()
    if not _NUMBER.fullmatch(plain):
        return plain
    sign, digits = plain[0] == "-", unicodedata.normalize("NFKC", plain).lstrip("+-")
    whole, _, fraction = digits.partition(".")
    digits = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}"
    return f"{'-' if sign and digits != '0.' else ''}{digits}"


def known_label(label: str, known: Iterable[str]) -> str | None:
    """The one of the known labels that `label` means, or None."""
    if label in (names := tuple(known)):
        return label
    return next((name for name in names if label_key(name) == label_key(label)), None)


def _is_list(text: str) -> bool:
    """Whether Python or numpy wrote a list, a tuple, a set, an array or a tensor here."""
    if _NUMPY.fullmatch(text):
        return True
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return False
    try:
        return isinstance(ast.literal_eval(text), (list, tuple, set, dict))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
