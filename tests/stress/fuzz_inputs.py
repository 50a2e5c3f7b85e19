"""Inputs to fuzz with: JSON with values changed, bytes damaged, and values that are odd now and then."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from edgeprompt.prompts.file import METADATA_KEY

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([-1, 0, 1 << 31, 1 << 64, "", "\ud800", "..", [], {}, [[]], "input", "classify", 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
CUTS = st.lists(st.tuples(st.floats(0, 1), st.integers(-1, 255)), min_size=1, max_size=4)
Path_ = tuple[str | int, ...]


def places(data: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Paths of all values in a JSON object."""
    yield here
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*here, key))


def changed(data: Any, path: Path_, change: Any) -> Any:
    """A copy in which the value at `path` is `change(value)`."""
    if not path:
        return change(data)
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = changed(data[path[0]], path[1:], change)
    return copy


@st.composite
def mutations(draw: st.DrawFn, data: Any) -> Any:
    """`data` with one to three values replaced, dropped, or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))[1:] or [()]))
        kind = draw(st.sampled_from(["replace", "drop", "grow"]))
        if kind == "replace" or not path:
            value = draw(JSON)
            data = changed(data, path, lambda _, value=value: value)
        elif kind == "drop":
            data = changed(data, path[:-1], lambda old, key=path[-1]: without(old, key))
        else:
            extra = draw(JSON)
            data = changed(data, path, lambda old, extra=extra: grown(old, extra))
        if not isinstance(data, dict | list):
            return data
    return data


def without(old: Any, key: str | int) -> Any:
    """A container without one entry."""
    if isinstance(old, dict):
        return {name: value for name, value in old.items() if name != key}
    return [value for index, value in enumerate(old) if index != key]


def grown(old: Any, extra: Any) -> Any:
    """A container with one entry more; anything else, twice."""
    if isinstance(old, dict):
        return {**old, "extra": extra}
    if isinstance(old, list):
        return [*old, extra]
    return [old, old]


def dumps(data: Any) -> bytes:
    """JSON as a careless writer makes it: NaN and surrogates may be in it."""
    return json.dumps(data, ensure_ascii=True).encode()


def damaged(data: bytes, cuts: list[tuple[float, int]]) -> bytes:
    """Bytes changed at some shares of their length; a negative value cuts there."""
    copy = bytearray(data)
    for share, value in cuts:
        at = min(int(share * len(copy)), len(copy) - 1)
        if value < 0:
            del copy[at:]
        elif copy:
            copy[at] = value
        if not copy:
            break
    return bytes(copy)


def mostly(good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One in sixteen is odd, so that what has many parts is good as a whole often enough."""
    return st.integers(0, 15).flatmap(lambda number: good if number else odd)


def with_metadata(file: bytes, metadata: Any) -> bytes:
    """A prompt file with other metadata."""
    (size,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + size]) | {"__metadata__": {METADATA_KEY: dumps(metadata).decode()}}
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + file[8 + size :]
