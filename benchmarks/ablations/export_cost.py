"""What exporting SmolLM2 at int4 costs, validation included: processor time, peak memory, and the package's size.

    python -m benchmarks.ablations.export_cost [--precision int4] [--route auto]

Runs `edgeprompt export` as a user does, in a process of its own, and writes benchmarks/results/export-cost.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, line

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import model_file  # noqa: E402


def main() -> None:
    """Export once, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--route", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgeprompt", "export", str(model_file()), "-o", f"{folder}/package", "--json"]
        command += ["--precision", options.precision, "--route", options.route]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        wall = time.perf_counter() - started
    # The only child so far, so the figures of all children are its own.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    made = json.loads(done.stdout)
    result = {
        "machine": describe(),
        "route": made["route"],
        "precision": made["precision"],
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": wall,
        "peak_rss_bytes": used.ru_maxrss * unit,
        "package_bytes": made["size_bytes"],
        "gguf_bytes": model_file().stat().st_size,
    }
    out = ROOT / "benchmarks" / "results" / "export-cost.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{made['precision']}, route {made['route']}: {result['cpu_seconds']:.0f} s of processor time, "
        f"{result['peak_rss_bytes'] / 1e9:.2f} GB at most; package {result['package_bytes'] / 1e6:.2f} MB, "
        f"GGUF file {result['gguf_bytes'] / 1e6:.2f} MB"
    )
    print(line(describe()))


if __name__ == "__main__":
    main()
