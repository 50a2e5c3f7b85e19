"""Proves a grafted package against the graphs that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeprompt import names
from edgeprompt.errors import ExportError, ValidationError
from edgeprompt.ort import processor
from edgeprompt.ort.session import graph_inputs
from edgeprompt.package.manifest import Manifest
from exporters.graft.virtual_tokens import find_embedding, find_scaled

Array = npt.NDArray[Any]
TOLERANCE = 1e-3
HALF_TOLERANCE = 3e-2
"""Of half precision and of what moves to another graph, as a share of the largest value: operators fuse otherwise."""
_CASES = ((1, 5, 0), (2, 4, 0), (1, 3, 4))
"""(batch, sequence, past)."""


def check_single(
    originals: Mapping[str, Path], folder: Path, manifest: Manifest, after_scale: bool, half: bool, scratch: Path
) -> dict[str, Any]:
    """Same outputs, bit for bit, without virtual ids, and with virtual rows that equal token rows.

    A graph with `half` weights is the exception: on the CPU, ONNX Runtime widens it around what it fuses, and the new
    nodes move where. It may differ within half precision.

    Raises:
        ValidationError: an output differs.
    """
    before = open_graph(originals["model"])
    after = open_graph(folder / manifest.graphs["model"].file)
    rows = _Rows(originals["model"], after_scale, scratch)
    random, worst = np.random.default_rng(0), 0.0
    for case in _CASES:
        feeds = _feeds(before, manifest, case, random)
        want = dict(zip(_outputs(before), _run(before, None, feeds), strict=True))
        where = f"batch {case[0]}, length {case[1]}, past {case[2]}"
        worst = max(worst, _compare_both(after, feeds, want, rows, manifest, half, where))
    return {"compared_with": "the ungrafted graph", "cases": len(_CASES), **_identical(worst)}


def check_encoder_decoder(
    originals: Mapping[str, Path], folder: Path, manifest: Manifest, after_scale: bool, half: bool, scratch: Path
) -> dict[str, Any]:
    """The encoder bit for bit (see `check_single` for half precision); decoder steps with the past they need.

    Raises:
        ValidationError: an output differs.
    """
    encoder, first, later = (open_graph(originals[key]) for key in ("encoder", "first", "next"))
    ours, decoder = (open_graph(folder / manifest.graphs[key].file) for key in ("encoder", "decoder"))
    rows = _Rows(originals["encoder"], after_scale, scratch)
    random = np.random.default_rng(0)
    size, worst, moved = manifest.geometry, 0.0, 0.0
    parts = [(layer, part) for layer in range(size.num_layers) for part in ("key", "value")]
    for case in ((1, 5, 0), (2, 7, 0)):
        where = f"batch {case[0]}, length {case[1]}"
        feeds = _feeds(encoder, manifest, case, random)
        (states,) = _run(encoder, [names.LAST_HIDDEN_STATE], feeds)
        tokens = np.full((case[0], 1), manifest.tokens.decoder_start or 0, np.int64)
        given = {
            names.INPUT_IDS: tokens,
            "encoder_hidden_states": states,
            "encoder_attention_mask": feeds["attention_mask"],
        }
        theirs = dict(zip(_outputs(first), _run(first, None, _known(first, given)), strict=True))
        cross = {names.cross_present(layer, part): theirs[f"present.{layer}.encoder.{part}"] for layer, part in parts}
        encoded_alike = {names.ENCODER_HIDDEN_STATES: states}
        worst = max(worst, _compare_both(ours, feeds, encoded_alike, rows, manifest, half, where))
        encoded = run_known(ours, {**feeds, names.PROMPT_EMBEDDINGS: rows(feeds[names.INPUT_IDS][0])})
        for name, value in cross.items():
            moved = max(moved, _near(encoded[name], value, half, f"{where}, {name}"))
        shared = {
            names.INPUT_IDS: tokens,
            names.ENCODER_ATTENTION_MASK: feeds["attention_mask"],
            **{names.cross_past(layer, part): cross[names.cross_present(layer, part)] for layer, part in parts},
        }
        empty = np.zeros((case[0], size.num_key_value_heads, 0, size.head_size), states.dtype)
        step = {**shared, **{names.past(layer, part): empty for layer, part in parts}}
        step[names.ATTENTION_MASK] = np.ones((case[0], 1), np.int64)
        got = dict(zip(_outputs(decoder), _run(decoder, None, _known(decoder, step)), strict=True))
        moved = max(moved, _near(got[names.LOGITS], theirs[names.LOGITS], half, f"{where}, first decoder step"))
        old = {**given, **{k.replace("present", "past_key_values"): v for k, v in theirs.items() if k != names.LOGITS}}
        want = dict(zip(_outputs(later), _run(later, None, _known(later, old)), strict=True))
        step |= {names.past(layer, part): theirs[f"present.{layer}.decoder.{part}"] for layer, part in parts}
        step[names.ATTENTION_MASK] = np.ones((case[0], 2), np.int64)
        second = {names.LOGITS: want[names.LOGITS]}
        worst = max(worst, _equal(run_known(decoder, step), second, half, f"{where}, second decoder step"))
    return {
        "compared_with": "the ungrafted graphs",
        "cases": 2,
        **_identical(worst),
        "max_moved_difference": round(moved, 6),
    }


def _identical(worst: float) -> dict[str, Any]:
    return {"identical": worst == 0.0, **({"max_half_difference": round(worst, 6)} if worst else {})}


class _Rows:
    """The embedding as the ungrafted graph computes it, alone in a session."""

    def __init__(self, path: Path, after_scale: bool, scratch: Path) -> None:
        model = ir.load(path)
        rows = find_embedding(model)[1]
        if after_scale:
            rows = find_scaled(rows)
        ids = next(value for value in model.graph.inputs if value.name == names.INPUT_IDS)
        rows.shape = None
        model.graph.outputs[:] = [rows]
        model.graph.sort()  # the pass goes backwards
        RemoveUnusedNodesPass()(model)
        model.graph.inputs[:] = [ids]
        target = scratch / "embedding.onnx"
        ir.save(model, target, external_data="embedding.onnx.data", size_threshold_bytes=1024)
        self._session = open_graph(target)

    def __call__(self, ids: Array) -> npt.NDArray[np.float32]:
        """float32 [count, width] for ids [count]."""
        found = _run(self._session, None, {names.INPUT_IDS: ids[None]})[0]
        return np.asarray(found.reshape(len(ids), -1), np.float32)


def open_graph(path: Path) -> Any:
    """A plain session on the CPU, with 8-bit weights as exact as the runtime has them (`edgeprompt.ort.session`).

    Raises:
        ExportError: ONNX Runtime does not load the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1" if processor.saturates() else "0")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise ExportError(f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0][:300]}") from error


def _run(session: Any, outputs: list[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
    try:
        found: list[Array] = session.run(outputs, feeds)
        return found
    except Exception as error:  # onnxruntime's errors have no common base
        raise ExportError(f"the graph does not run: {' '.join(str(error).split())[:300]}") from error


def _outputs(session: Any) -> list[str]:
    return [value.name for value in session.get_outputs()]


def _known(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    inputs = {value.name for value in graph_inputs(session)}
    return {name: value for name, value in feeds.items() if name in inputs}


def run_known(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name; feeds that the graph does not take are left out."""
    return dict(zip(_outputs(session), _run(session, None, _known(session, feeds)), strict=True))


def _feeds(
    session: Any, manifest: Manifest, case: tuple[int, int, int], random: np.random.Generator
) -> dict[str, Array]:
    """Random ids and caches for every input that the graph has."""
    batch, length, past = case
    inputs = {value.name: value.type for value in session.get_inputs()}
    size = manifest.geometry
    if names.past(0, "key") not in inputs:
        past = 0
    mask = np.ones((batch, past + length), np.int64)
    feeds: dict[str, Array] = {
        names.INPUT_IDS: random.integers(0, size.vocab_size, (batch, length)),
        names.ATTENTION_MASK: mask,
        names.POSITION_IDS: np.tile(np.arange(past, past + length), (batch, 1)),
        names.TOKEN_TYPE_IDS: np.zeros((batch, length), np.int64),
    }
    kind = np.float16 if manifest.kv_dtype == "float16" else np.float32
    for name in inputs:
        if name.startswith("past_key_values."):
            shape = (batch, size.num_key_value_heads, past, size.head_size)
            feeds[name] = random.standard_normal(shape).astype(kind)
    unknown = sorted(set(inputs) - set(feeds))
    if unknown:
        raise ExportError(f"the graph has inputs that edgeprompt does not feed: {', '.join(unknown)}")
    return {name: value for name, value in feeds.items() if name in inputs}


def _compare_both(
    session: Any,
    feeds: dict[str, Array],
    want: Mapping[str, Array],
    rows: _Rows,
    manifest: Manifest,
    half: bool,
    where: str,
) -> float:
    ids, first = feeds[names.INPUT_IDS], manifest.geometry.vocab_size
    unused = rows(ids[0, :1])
    plain = run_known(session, {**feeds, names.PROMPT_EMBEDDINGS: unused})
    worst = _equal(plain, want, half, f"{where}, no virtual ids")
    virtual = ids.copy()
    virtual[:, : ids.shape[1] // 2] = first + np.arange(ids.shape[0] * (ids.shape[1] // 2)).reshape(ids.shape[0], -1)
    table = rows(ids[:, : ids.shape[1] // 2].ravel())
    placed = run_known(session, {**feeds, names.INPUT_IDS: virtual, names.PROMPT_EMBEDDINGS: table})
    return max(worst, _equal(placed, want, half, f"{where}, virtual rows equal to token rows"))


def _equal(got: Mapping[str, Array], want: Mapping[str, Array], half: bool, where: str) -> float:
    """The largest difference, which may be above zero in half precision only."""
    largest = 0.0
    for name, expected in want.items():
        if np.array_equal(got[name], expected):
            continue
        worst = float(np.abs(got[name].astype(np.float64) - expected).max())
        scale = max(float(np.abs(expected).max()), 1.0)
        if not (half and worst <= HALF_TOLERANCE * scale):
            raise ValidationError(
                f"the grafted graph differs from the ungrafted one: {name}, {where}: by {worst:.3g} of {scale:.3g}"
            )
        largest = max(largest, worst)
    return largest


def _near(got: Array, want: Array, half: bool, where: str) -> float:
    worst, scale = float(np.abs(got - want).max()), float(np.abs(want).max())
    if not worst <= (HALF_TOLERANCE if half else TOLERANCE) * max(scale, 1.0):
        raise ValidationError(f"the package differs from the ungrafted graphs: {where}: by {worst:.3g} of {scale:.3g}")
    return worst
