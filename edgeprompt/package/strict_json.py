"""Strict reading of our own JSON: unknown, missing and duplicate keys are errors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_MAX_DIGITS = 1000


def loads(text: str | bytes) -> Any:
    """`json.loads` that refuses duplicate keys, NaN and Infinity (also where a number like 1e999 reads as one).

    Raises:
        ValueError: the text is no strict JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if len(set(keys)) != len(keys):
            raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return dict(items)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not allowed")

    def number(text: str) -> float:
        found = float(text)
        if not math.isfinite(found):
            raise ValueError(f"the number {text} is too large")
        return found

    try:
        return json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
            parse_int=integer,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def consistent(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of foreign JSON (an `object_pairs_hook` of `json.loads`): a key may be twice where both say the same.

    Raises:
        ValueError: it has a key with two values.
    """
    found = dict(items)
    twice = next((key for key, value in items if value is not found[key] and value != found[key]), None)
    if twice is not None:
        raise ValueError(f"it says two things of {twice!r}")
    return found


def integer(text: str) -> int:
    """A JSON integer of a size that a file may have (a `parse_int` of `json.loads`).

    Raises:
        ValueError: it has more digits than any size.
    """
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:9]}... has {len(text)} digits")
    return int(text)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Deterministic JSON: sorted keys, no NaN, UTF-8 kept."""
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent, separators=separators)


def check_keys(kind: type[T], data: object, where: str) -> Mapping[str, Any]:
    """Return `data` as a mapping whose keys are exactly fields of the dataclass `kind` (those with defaults may lack).

    Raises:
        ValueError: not an object, or keys are unknown or missing.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a JSON object, found {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    if unknown:
        raise ValueError(f"{where} has unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    if missing:
        raise ValueError(f"{where} lacks key {missing[0]!r}")
    return data


def check_type(value: object, kind: type[T] | tuple[type, ...], where: str) -> Any:
    """Return `value` if it is an instance of `kind` (a bool is no int).

    Raises:
        ValueError: another type.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{where} must be {names}, found {type(value).__name__}")
    return value
