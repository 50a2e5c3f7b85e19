"""The benchmarks' bases with their weights as floats, and what peers make of those in 4 bits.

A GGUF file's weights lie on the grid that its own quantiser chose, where the same quantiser finds them again: llama.cpp
would lose nothing, and neither would we on another file. So each weight is moved by up to half a step of its grid, at
random: what rounding took away is put back as a guess. The result is float16, once for all who quantise it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import WORK, Model, model_file  # noqa: E402

_LEVELS = {"Q4_0": 16, "Q4_1": 15, "Q4_K": 15, "Q5_0": 32, "Q5_K": 31, "Q6_K": 63, "Q8_0": 254}
"""GGUF type -> steps between the least and the largest weight of a block."""
_RUN = 32


def float_base(model: Model) -> Path:
    """A GGUF file of float16 matrices, made if it is not there yet."""
    out = WORK / f"{model.name}-f16.gguf"
    if not out.exists():
        _write_floats(model_file(model), out)
    return out


def q4_k_m(model: Model, libraries: Path) -> Path:
    """llama.cpp's Q4_K_M of `float_base`, made with its libraries in a folder (`llamacpp_quantize.py`)."""
    out = WORK / f"{model.name}-f16-q4_k_m.gguf"
    if not out.exists():
        script = Path(__file__).with_name("llamacpp_quantize.py")
        words = [sys.executable, script, libraries, float_base(model), out]
        subprocess.run(words, check=True, stdout=sys.stderr)
    return out


def genai_int4(model: Model) -> Path | None:
    """What ONNX Runtime GenAI's builder makes of `float_base` in int4 by default; None where it fails."""
    from benchmarks.peers.prepare import build_genai, save_hf

    folder, out = WORK / f"{model.name}-f16-hf", WORK / f"{model.name}-f16-genai"
    if not folder.exists():
        save_hf(float_base(model), folder)
    if not out.exists():
        build_genai(folder, out, ())
    return out if out.exists() else None


def _write_floats(source: Path, out: Path) -> None:
    import gguf

    reader, random = gguf.GGUFReader(source), np.random.default_rng(0)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind, inner = field.types[0], field.types[-1]
        value = int(gguf.LlamaFileType.MOSTLY_F16) if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, kind, inner if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind == "F32":
            writer.add_tensor(tensor.name, np.array(tensor.data))
        else:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, _off_grid(weights, _LEVELS[kind], random).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def _off_grid(weights: npt.NDArray[np.float32], levels: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Weights [rows, columns], each moved by at most half a step of its run of `_RUN`."""
    runs = weights.reshape(-1, _RUN)
    steps = (runs.max(1, keepdims=True) - runs.min(1, keepdims=True)) / levels
    moved: npt.NDArray[np.float32] = runs + steps * (random.random(runs.shape, np.float32) - 0.5)
    return moved.reshape(weights.shape)
