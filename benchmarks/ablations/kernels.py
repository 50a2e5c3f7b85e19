"""What the matrix products of a model take by themselves: the least time of a step with ONNX Runtime's kernels.

    python -m benchmarks.ablations.kernels [--threads 2] [--rows 1,32]

A graph with nothing but the products of SmolLM2-135M (30 layers and the output layer, random weights) is run for
several formats in turn: those of our packages, of GenAI's, and what was tried and left out. Rows of 1 are a decode
step, 32 a prefill; the output layer has one row. What a package's step takes beyond this is attention, norms,
activations and the time between operators.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import describe, line
from edgeprompt.ort.session import import_onnxruntime

RESULT = Path(__file__).resolve().parents[1] / "results" / "kernels.json"
LAYERS, HIDDEN, INNER, QKV, VOCAB = 30, 576, 1536, 960, 49152
SHAPES = ((HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN))
"""(columns, rows) of a layer's weights: qkv, output, gate, up, down."""
REPEATS = 40


@dataclass(frozen=True)
class Format:
    """How the weights of layers and output layer are stored."""

    bits: int = 4
    block: int = 32
    """Columns that share a scale, or half of it where it does not divide them. 0: int8, each row has one scale."""
    head_bits: int = 8
    offsets: bool = False
    """Columns more for the blocks' float offsets (`exporters.quantize.graph`)."""
    float_zero_points: bool = False
    gate_and_up: bool = False
    """One product for both."""


FORMATS = {
    "int4, output layer too": Format(head_bits=4),
    "int4": Format(),
    "int4 with offsets": Format(offsets=True),
    "int4, blocks of 64": Format(block=64),
    "int4, blocks of 128": Format(block=128),
    "int4, blocks of 128, output layer too": Format(block=128, head_bits=4),
    "int4, blocks of 128, gate and up in one": Format(block=128, gate_and_up=True),
    "int4, float zero points": Format(float_zero_points=True),
    "2 bits, blocks of 128": Format(bits=2, block=128),
    "8 bits in blocks": Format(bits=8),
    "int8": Format(bits=8, block=0),
}


class _Graph:
    """Products that read the same few inputs; every one's result is an output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.outputs: list[str] = []
        self._random = np.random.default_rng(0)

    def add(
        self, op: str, source: str, tensors: dict[str, np.ndarray], order: tuple[str, ...], **attributes: int
    ) -> None:
        name = f"product_{len(self.nodes)}"
        self.weights += [numpy_helper.from_array(value, f"{name}_{key}") for key, value in tensors.items()]
        inputs = [source if key == "x" else f"{name}_{key}" if key else "" for key in order]
        self.nodes.append(helper.make_node(op, inputs, [name], domain="com.microsoft", **attributes))
        self.outputs.append(name)

    def block(
        self, source: str, columns: int, rows: int, bits: int, size: int, *, float_zero_points: bool = False
    ) -> None:
        count = -(-columns // size)
        tensors = {
            "codes": self._random.integers(0, 256, (rows, count, size * bits // 8), np.uint8),
            "scales": np.full(rows * count, 0.01, np.float32),
        }
        if float_zero_points:
            tensors["zeros"] = np.full(rows * count, 7.5, np.float32)
        self.add(
            "MatMulNBits",
            source,
            tensors,
            ("x", *tensors),
            K=columns,
            N=rows,
            bits=bits,
            block_size=size,
            accuracy_level=4,
        )

    def signed(self, source: str, columns: int, rows: int) -> None:
        self.add(
            "MatMulIntegerToFloat",
            source,
            {
                "codes": self._random.integers(-127, 128, (columns, rows)).astype(np.int8),
                "one": np.array(0.01, np.float32),
                "scales": np.full(rows, 0.01, np.float32),
                "zero": np.array(128, np.uint8),
            },
            ("x", "codes", "one", "scales", "zero"),
        )


def build(form: Format) -> bytes:
    """The products of one format as a model."""
    graph = _Graph()
    shapes = SHAPES
    if form.gate_and_up:
        shapes = tuple((columns, 2 * INNER if rows == INNER else rows) for columns, rows in dict.fromkeys(SHAPES))
    for _ in range(LAYERS):
        for columns, rows in shapes:
            if not form.block:
                graph.signed(f"u{columns}", columns, rows)
                continue
            size = form.block if columns % form.block == 0 else form.block // 2
            wide = columns + (-(-columns // size // size) * size if form.offsets else 0)
            graph.block(f"f{wide}", wide, rows, form.bits, size, float_zero_points=form.float_zero_points)
    graph.block("last", HIDDEN, VOCAB, form.head_bits, 64 if form.head_bits == 8 else 32)
    used = {name for node in graph.nodes for name in node.input}
    widths = {f"f{HIDDEN}": HIDDEN, f"f{INNER}": INNER, f"u{HIDDEN}": HIDDEN, f"u{INNER}": INNER}
    widths |= {f"f{HIDDEN + 32}": HIDDEN + 32, f"f{INNER + 64}": INNER + 64, "last": HIDDEN}
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.UINT8 if name.startswith("u") else TensorProto.FLOAT,
            [1 if name == "last" else "rows", width],
        )
        for name, width in widths.items()
        if name in used
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in graph.outputs]
    made = helper.make_graph(graph.nodes, "products", inputs, outputs, graph.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    content: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def runner(model: bytes, rows: int, threads: int) -> Callable[[], None]:
    """A call that runs every product once, into memory that is there already."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of one format would spin on while the next is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = (1 if value.name == "last" else rows, value.shape[1])
        eight = "uint8" in value.type
        feeds[value.name] = (
            random.integers(0, 256, shape, np.uint8) if eight else random.normal(size=shape).astype("f4")
        )
    binding = session.io_binding()
    for name, feed in feeds.items():
        binding.bind_cpu_input(name, feed)
    for value, found in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        kept = ort.OrtValue.ortvalue_from_numpy(found)
        binding.bind_ortvalue_output(value.name, kept)
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    """Measure all formats in turn, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,32")
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    calls = {
        (kind, count): runner(build(form), count, options.threads) for kind, form in FORMATS.items() for count in rows
    }
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    order = list(calls)
    for _ in range(REPEATS):
        for key in order:
            started = time.perf_counter()
            calls[key]()
            samples[key].append(time.perf_counter() - started)
        order = [*order[1:], order[0]]  # whoever comes behind a large product finds the caches cold
    found = {
        kind: {str(count): [1e3 * value for value in samples[kind, count][2:]] for count in rows} for kind in FORMATS
    }
    machine = describe()
    facts = {"machine": machine, "threads": options.threads, "milliseconds": found}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"| matmuls | {' | '.join(f'{count} tokens (ms)' for count in rows)} |\n| --- |{' --- |' * len(rows)}")
    for kind, one in found.items():
        cells = []
        for values in one.values():
            low, high = np.percentile(values, [10, 90])
            cells.append(f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})")
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"\n{options.threads} threads. {line(machine)}")


if __name__ == "__main__":
    main()
