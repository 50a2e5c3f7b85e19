"""Quantises a GGUF file of floats to Q4_K_M, as llama.cpp's `llama-quantize FLOATS OUT Q4_K_M` does.

    python benchmarks/quality/llamacpp_quantize.py FOLDER FLOATS OUT

FOLDER holds llama.cpp's libraries, for example `bins/linux-x64` of the npm package @node-llama-cpp/linux-x64.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_Q4_K_M = 15
"""LLAMA_FTYPE_MOSTLY_Q4_K_M of llama.h."""


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params: what is set here, and room for what llama.cpp sets by default."""

    _fields_ = (("threads", ctypes.c_int32), ("ftype", ctypes.c_int32), ("others", ctypes.c_char * 1024))


def main() -> None:
    """Quantise; OUT appears once it is complete."""
    folder, source, out = (Path(word) for word in sys.argv[1:])
    loaded = {
        name: ctypes.CDLL(str(next(folder.glob(f"{name}*.so"))), mode=ctypes.RTLD_GLOBAL)
        for name in ("libggml-base", "libggml.", "libllama.")
    }
    loaded["libggml."].ggml_backend_load_all_from_path(str(folder).encode())
    llama = loaded["libllama."]
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = _Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = _Q4_K_M
    partial = out.with_suffix(".partial")
    if llama.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp cannot quantise {source}")
    os.replace(partial, out)


if __name__ == "__main__":
    main()
