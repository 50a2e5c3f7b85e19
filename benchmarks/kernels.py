"""What the matrix products of a model take by themselves: the least time of a step with ONNX Runtime's kernels.

    python -m benchmarks.kernels [--threads 2] [--rows 1,32]

A graph with nothing but the products of SmolLM2-135M (30 layers and the output layer, random weights) is run for
several formats in turn. Rows of 1 are a decode step, 32 a prefill; the output layer has one row. What a package's step
takes beyond this is attention, norms, activations and the time between operators.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import describe, line
from edgeprompt.session import import_onnxruntime

RESULT = Path(__file__).resolve().parent / "results" / "kernels.json"
LAYERS, HIDDEN, INNER, QKV, VOCAB = 30, 576, 1536, 960, 49152
SHAPES = ((HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN))
"""(columns, rows) of a layer's weights: qkv, output, gate, up, down."""
BLOCK = 32
REPEATS = 40


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

    def block(self, source: str, columns: int, rows: int, bits: int, size: int = BLOCK) -> None:
        count = -(-columns // size)
        codes = self._random.integers(0, 256, (rows, count, size * bits // 8), np.uint8)
        scales = np.full(rows * count, 0.01, np.float32)
        self.add(
            "MatMulNBits",
            source,
            {"codes": codes, "scales": scales},
            ("x", "codes", "scales"),
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


def build(kind: str) -> bytes:
    """The products of one format as a model."""
    graph = _Graph()
    for _ in range(LAYERS):
        for columns, rows in SHAPES:
            match kind:
                case "int8":
                    graph.signed(f"u{columns}", columns, rows)
                case "int4 with offsets":
                    more = -(-columns // BLOCK // BLOCK) * BLOCK
                    graph.block(f"f{columns + more}", columns + more, rows, 4)
                case "int4, blocks of 64":
                    graph.block(f"f{columns}", columns, rows, 4, 64)
                case "int4, blocks of 128" | "int4, blocks of 128, output layer too":
                    graph.block(f"f{columns}", columns, rows, 4, 64 if columns % 128 else 128)
                case "8 bits in blocks":
                    graph.block(f"f{columns}", columns, rows, 8)
                case _:
                    graph.block(f"f{columns}", columns, rows, 4)
    graph.block("last", HIDDEN, VOCAB, 4 if kind.endswith("output layer too") else 8)
    used = {name for node in graph.nodes for name in node.input}
    widths = {f"f{HIDDEN}": HIDDEN, f"f{INNER}": INNER, f"u{HIDDEN}": HIDDEN, f"u{INNER}": INNER}
    widths |= {f"f{HIDDEN + BLOCK}": HIDDEN + BLOCK, f"f{INNER + 2 * BLOCK}": INNER + 2 * BLOCK, "last": HIDDEN}
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
    made = helper.make_graph(graph.nodes, kind, inputs, outputs, graph.weights)
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
    kinds = (
        "int4, output layer too",
        "int4",
        "int4 with offsets",
        "int4, blocks of 64",
        "int4, blocks of 128",
        "int4, blocks of 128, output layer too",
        "8 bits in blocks",
        "int8",
    )
    rows = [int(count) for count in options.rows.split(",")]
    calls = {(kind, count): runner(build(kind), count, options.threads) for kind in kinds for count in rows}
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(REPEATS):
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            samples[key].append(time.perf_counter() - started)
    found = {
        kind: {str(count): [1e3 * value for value in samples[kind, count][2:]] for count in rows} for kind in kinds
    }
    machine = describe()
    facts = {"machine": machine, "threads": options.threads, "milliseconds": found}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"| products | {' | '.join(f'{count} rows (ms)' for count in rows)} |\n| --- |{' --- |' * len(rows)}")
    for kind, one in found.items():
        cells = []
        for values in one.values():
            low, high = np.percentile(values, [10, 90])
            cells.append(f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})")
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"\n{options.threads} threads. {line(machine)}")


if __name__ == "__main__":
    main()
