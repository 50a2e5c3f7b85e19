"""How fast this machine reads memory: what bounds decoding, where every token reads all weights once."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

BYTES = 512 << 20
"""Far larger than any cache."""


def read_speed(threads: int, repetitions: int = 5) -> list[float]:
    """Bytes per second, read by `threads` threads at once.

    Run in a process of its own: `OPENBLAS_NUM_THREADS` must be 1 before numpy is imported.
    """
    import numpy as np

    data = np.ones(BYTES // 4, np.float32)
    parts = np.array_split(data, threads)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for number in range(1 + repetitions):
            started = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            if number:
                found.append(BYTES / (time.perf_counter() - started))
    return found


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    print(*read_speed(int(sys.argv[1])))
