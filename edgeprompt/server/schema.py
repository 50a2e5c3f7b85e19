"""Checks values against JSON Schema, as far as the bodies of this server use it.

The schemas in `edgeprompt.server.bodies` are what `/openapi.json` shows, so what is written there is what is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any]


class SchemaError(ValueError):
    """A value breaks a schema."""

    def __init__(self, where: str, message: str) -> None:
        """`where`: the field, as `messages.0.role`; empty for the whole."""
        super().__init__(f"{where or 'the body'} {message}")
        self.where = where


def check(schema: Schema, value: Any, where: str = "") -> None:
    """Compare a value with a schema; `description` of a schema is what an error says is allowed.

    Raises:
        SchemaError: names the field.
    """
    if "anyOf" in schema:
        _check_any(schema, value, where)
        return
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is(kind, value) for kind in kinds):
        raise SchemaError(where, f"must be {' or '.join(map(_named, kinds))}, found {_kind(value)}")
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        raise SchemaError(
            where, f"must be {_listed(schema['enum'])}; {schema.get('description', 'no other value is known')}"
        )
    if isinstance(value, str):
        _check_size(schema, len(value), "Length", "characters", where)
    elif isinstance(value, list):
        _check_size(schema, len(value), "Items", "items", where)
        for index, item in enumerate(value):
            check(schema.get("items", {}), item, _join(where, str(index)))
    elif isinstance(value, dict):
        _check_size(schema, len(value), "Properties", "fields", where)
        _check_object(schema, value, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(schema, value, where)


def _check_any(schema: Schema, value: Any, where: str) -> None:
    errors = []
    for one in schema["anyOf"]:
        try:
            check(one, value, where)
        except SchemaError as error:
            errors.append((error, one))
        else:
            return
    # Where the kind is one of those allowed, what is wrong inside says more than the list of kinds.
    inside = [(error, one) for error, one in errors if "type" in one and _is(one["type"], value)]
    if inside:
        raise max(inside, key=lambda pair: (_begins_as(pair[1], value), pair[0].where.count(".")))[0]
    raise SchemaError(where, f"must be {schema.get('description', 'of another kind')}, found {_kind(value)}")


def _begins_as(schema: Schema, value: Any) -> bool:
    """Whether the first item of a list is of the kind that a schema's items are."""
    kind = schema.get("items", {}).get("type")
    return bool(isinstance(value, list) and value and kind and _is(kind, value[0]))


def _check_object(schema: Schema, value: Mapping[str, Any], where: str) -> None:
    known = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            raise SchemaError(_join(where, name), "is missing")
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in known:
            check(known[name], item, _join(where, name))
        elif others is False:
            raise SchemaError(_join(where, name[:64]), f"is not supported; known: {', '.join(known)}")
        elif isinstance(others, Mapping):
            check(others, item, _join(where, name[:64]))


def _check_size(schema: Schema, size: int, what: str, named: str, where: str) -> None:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    if size < low:
        raise SchemaError(where, f"has {size} {named}; at least {low} are needed")
    if high is not None and size > high:
        raise SchemaError(where, f"has {size} {named}; at most {high} are allowed")


def _check_number(schema: Schema, value: float, where: str) -> None:
    low, high, above = (schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum"))
    if low is not None and value < low:
        raise SchemaError(where, f"is {_digits(value)}; it must be at least {low}")
    if above is not None and value <= above:
        raise SchemaError(where, f"is {_digits(value)}; it must be above {above}")
    if high is not None and value > high:
        raise SchemaError(where, f"is {_digits(value)}; it must be at most {high}")


def _digits(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:  # an integer beyond all floats
        text = str(value)
        return f"{text[:6]}... ({len(text)} digits)"


def _is(kind: str, value: Any) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return (isinstance(value, int) and not isinstance(value, bool)) or (
                isinstance(value, float) and value.is_integer()
            )
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return value is None


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


_NAMES = {"string": "a text", "boolean": "true or false", "integer": "an integer", "number": "a number"}
_NAMES |= {"array": "a list", "object": "an object", "null": "null"}


def _named(kind: str) -> str:
    return _NAMES[kind]


def _kind(value: Any) -> str:
    return next(_NAMES[kind] for kind in _NAMES if _is(kind, value))


def _listed(values: list[Any]) -> str:
    return " or ".join(
        "null" if one is None else repr(one) if isinstance(one, str) else str(one).lower() for one in values
    )


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
