"""Manifests and prompt files: what Python's reader refuses, the npm package's refuses with the same kind of error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprompt.errors import EdgePromptError
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import Golden, Head, HeadStep, PromptFile, TunedFor, from_bytes
from tests.support.prompts import make_prompt

_ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 1.0, 0.5, 1e300, 2**31, 2**70, "", "x", "1", "../x", "/x", "a\\b", "\ud800", [], [1], ["a"],
    [""],
    [[]], [["a", []]], [["a", ["b"]]], [["a", [""]], ["a", ["b"]]], {}, {"a": 1}, {"name": "x"}, {"literal": "x"},
    [{"slot": "text"}], [{"slot": "text"}, {"virtual_tokens": 0}], [{"literal": "x"}], [{"virtual_tokens": None}] * 2,
)  # fmt: skip


def _prompts(manifest: Manifest) -> list[PromptFile]:
    head = Head("last", (HeadStep("linear", "score"), HeadStep("tanh")))
    tensors = {"score.weight": np.ones((2, manifest.geometry.hidden_size), np.float32)}
    golden = Golden({"text": "a"}, "x", (1, 2), {"x": 0.5})
    words = {"x": (" good", " fine"), "y": (" bad",)}
    return [
        make_prompt(
            manifest,
            "words",
            verbalizer=words,
            golden=golden,
            tuned_for=TunedFor("int4", None),
            distilled_from={"teacher": "x"},
        ),
        make_prompt(manifest, "deep", "prefix-tuning", generation={"max_new_tokens": 4}),
        make_prompt(manifest, "head", task="classify", head=tensors, head_spec=head, labels=("x", "y")),
    ]


def _mutated(value: Any) -> Iterator[Any]:
    """`value` with one thing changed: every key lacking, unknown, or of an odd value, at every depth."""
    if isinstance(value, dict):
        yield {**value, "unknown": 1}
        for key, inner in value.items():
            yield {name: one for name, one in value.items() if name != key}
            for odd in _ODD:
                yield {**value, key: odd}
            for changed in _mutated(inner):
                yield {**value, key: changed}
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield [*value[:place], *value[place + 1 :]]
            for changed in _mutated(inner):
                yield [*value[:place], changed, *value[place + 1 :]]


def _bytes_of(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _broken_prompts(prompt: PromptFile) -> Iterator[bytes]:
    whole = prompt.to_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    text = header["__metadata__"]["edgeprompt"]
    for changed in _mutated(json.loads(text)):
        yield _bytes_of(json.dumps({**header, "__metadata__": {"edgeprompt": json.dumps(changed)}}).encode(), data)
    for old, new in (
        ('"name":', '"name":"a","name":'), ('"version":1', '"version":1.0'), ('"version":1', '"version":1e999'),
        ('"version":1', '"version":NaN'), ('"version":1', '"version":01'), ("{", '{"a":' + "[" * 100_000, ), ("}", ""),
    ):  # fmt: skip
        changed = text.replace(old, new, 1)
        yield _bytes_of(json.dumps({**header, "__metadata__": {"edgeprompt": changed}}).encode(), data)
    for changed in _mutated({name: one for name, one in header.items() if name != "__metadata__"}):
        yield _bytes_of(json.dumps({**changed, "__metadata__": header["__metadata__"]}).encode(), data)
    for metadata in ({}, {"format": "pt"}, {**header["__metadata__"], "format": "pt"}, None, {"edgeprompt": 1}):
        yield _bytes_of(json.dumps({**header, "__metadata__": metadata}).encode(), data)
    for cut in (0, 4, 8, 9, 8 + size - 1, 8 + size, 8 + size + 5, len(whole) - 1):
        yield whole[:cut]
    yield whole + b"\0"
    for claimed in (0, 1, 2**20 + 1, 2**40, 2**64 - 1):
        yield struct.pack("<Q", claimed) + whole[8:]
    for value in (np.nan, np.inf, -np.inf):
        yield whole[:-4] + struct.pack("<f", value)
    yield whole[:8] + b"\xff" + whole[9:]


def _compare(
    ask: Callable[..., Any], way: str, files: list[bytes], read: Callable[[bytes], object], folder: Path
) -> int:
    """How many files both refuse; every verdict and kind of error must be Python's."""
    paths = []
    for number, data in enumerate(files):
        paths.append(folder / str(number))
        paths[-1].write_bytes(data)
    answers = ask(way, files=[str(path) for path in paths])
    refused, wrong = 0, []
    for data, answer in zip(files, answers, strict=True):
        try:
            read(data)
            kind, said = None, ""
        except EdgePromptError as error:
            kind, said = type(error).__name__, str(error)
            refused += 1
        if said.startswith("tuned_for must be a JSON object, found list"):
            continue  # a list of them is in the format, and Python's reader may be older than that
        if answer.get("error") != kind:
            wrong.append((said, answer.get("message"), data))
    told = sorted({f"Python: {said or 'accepted'}; npm: {found or 'accepted'}" for said, found, _ in wrong})
    assert not wrong, "\n".join([*told[:20], str(wrong[0][2][:2000])])
    return refused


def test_prompt_files(ask: Callable[..., Any], tiny_llama_package: Path, tmp_path: Path) -> None:
    manifest = open_package(tiny_llama_package).manifest
    for prompt in _prompts(manifest):
        folder = tmp_path / prompt.name
        folder.mkdir()
        files = list(_broken_prompts(prompt))
        assert _compare(ask, "prompts", files, from_bytes, folder) > 200
        assert _compare(ask, "prompts", [prompt.to_bytes()], from_bytes, folder) == 0


def test_manifests(ask: Callable[..., Any], tiny_llama_package: Path, tmp_path: Path) -> None:
    text = (tiny_llama_package / "edgeprompt.json").read_text("utf-8")
    data = json.loads(text)
    data.update(validation={}, extra={}, versions={}, quality={"kl_mean": 0.1}, target="web")
    files = [json.dumps(one).encode() for one in _mutated(data)]
    files += [text.replace('"format"', '"format":"a","format"', 1).encode(), b"", b"[]", b"\xff", text.encode()[:-3]]
    assert _compare(ask, "manifests", files, Manifest.from_json, tmp_path) > 300


@pytest.mark.parametrize("whole", [True, False])
def test_weights_hash(ask: Callable[..., Any], tiny_llama_package: Path, whole: bool, tmp_path: Path) -> None:
    data = json.loads((tiny_llama_package / "edgeprompt.json").read_text("utf-8"))
    if not whole:
        data["graphs"]["model"]["data"] = {}
    file = tmp_path / "edgeprompt.json"
    file.write_text(json.dumps(data))
    (found,) = ask("manifests", files=[str(file)])
    assert found["value"] == Manifest.from_json(file.read_bytes()).weights_hash
