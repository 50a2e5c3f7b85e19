"""llama.cpp's own HTTP server on a GGUF file, until standard input ends: MODEL THREADS SLOTS; tells its address.

Runs in an environment that has xllamacpp, which carries llama.cpp's server.
"""

from __future__ import annotations

import sys

import xllamacpp


def main() -> None:
    """Serve."""
    model, threads, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = 512 * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cont_batching = params.cache_prompt = params.warmup = True
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
