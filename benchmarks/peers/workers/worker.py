"""One peer, one process: load, do the work, print one JSON object a line. Standard library only.

`worker.py MODULE VARIANT WORK cold`: the first label, then what it took in memory; `... full`: every timing with one
prompt; `... prepare`: what the peer must make once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

LIBRARIES = ("edgeprompt", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch", "transformers", "peft",
             "optimum-onnx", "numpy")  # fmt: skip
PROBE = 8
"""The best batch size is chosen by one of so many snippets."""


def main() -> None:
    """Run what the command line names."""
    module, variant, file, mode = sys.argv[1:5]
    work = json.loads(Path(file).read_text(encoding="utf-8"))
    work["quick"] = "quick" in sys.argv[5:]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(work["threads"])
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's: no peer computes with it, and its threads spin on import
    found = importlib.import_module(module)
    if mode == "prepare":
        if hasattr(found, "prepare"):
            found.prepare(work, variant)
        say(prepared=True)
        return
    peer = found.Peer(work, variant)
    if mode == "cold":
        label = peer.classify(work["snippets"][:1], 1)[0]
        say(label=label)
        peer.generate(work["texts"]["32"][0], work["new_tokens"])
        say(peak_rss=peak_rss())
        return
    say(**measure(peer, work))


def measure(peer: object, work: dict) -> dict:
    """Everything but cold start. Seconds; one untimed run comes before each timed series."""
    found: dict = {"ttft_cached": {}, "ttft_uncached": {}}
    quick = work["quick"]
    for count, texts in work["texts"].items():
        texts = texts[:2] if quick else texts
        peer.first(texts[-1], cached=True)
        found["ttft_cached"][count] = [timed(lambda t=text: peer.first(t, cached=True)) for text in texts]
        peer.first(texts[-1], cached=False)
        found["ttft_uncached"][count] = [timed(lambda t=text: peer.first(t, cached=False)) for text in texts]
    count = 8 if quick else work["new_tokens"]
    texts = work["texts"]["32"][: 1 if quick else 3]
    peer.generate(texts[0], 8)
    speeds, digests = [], []
    for text in texts:
        first, total, ids = peer.generate(text, count)
        if len(ids) != count:
            raise RuntimeError(f"{len(ids)} tokens instead of {count}")
        speeds.append((count - 1) / (total - first))
        digests.append([int(token) for token in ids])
    found["decode"] = speeds
    found["tokens"] = digests
    import hashlib  # here, as below: what a start does not need is not part of it
    import platform

    found["tokens_hash"] = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    snippets = work["snippets"][: 16 if quick else None]
    probe = {
        batch: timed(lambda b=batch: peer.classify(snippets[: max(16, len(snippets) // PROBE)], b))
        for batch in peer.batches
    }
    best = min(probe, key=probe.get)
    started = time.perf_counter()
    labels = peer.classify(snippets, best)
    found["classify"] = len(snippets) / (time.perf_counter() - started)
    found["classify_batch"] = best
    found["labels"] = labels
    found["versions"] = {"python": platform.python_version()} | {
        name: number for name in LIBRARIES if (number := version_of(name))
    }
    return found


def timed(work: object) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def say(**values: object) -> None:
    """One line for the orchestrator."""
    print(json.dumps(values), flush=True)


def peak_rss() -> int:
    """Bytes of the largest resident set of this process (getrusage would count what its parent had before exec)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def version_of(name: str) -> str | None:
    """Installed version, if any."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
