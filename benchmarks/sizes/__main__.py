"""What an export of bases of true sizes takes: processor time, peak memory, the package's size.

    python -m benchmarks.sizes [--sizes llama-3.2-1b,llama-3.2-3b] [--precision int4] [--work FOLDER] [--label now]

Each base is written with random weights (`benchmarks.sizes.checkpoints`), exported by `edgeprompt export` in a process
of its own, and deleted. Peak memory is the process's peak resident memory (the weights' mapped pages count there) and,
apart, the most anonymous memory that was seen, sampled twenty times a second. Rows are added to
benchmarks/results/sizes.json; `--table` prints them as docs/exporting.md has them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, line
from benchmarks.sizes.checkpoints import SIZES, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "sizes.json"
_OFTEN = 0.05


def main() -> None:
    """Measure the sizes asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="llama-3.2-1b", help=f"Of {', '.join(SIZES)}; with commas.")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--route", default="auto")
    parser.add_argument("--work", type=Path, help="Where checkpoints and packages lie meanwhile.")
    parser.add_argument("--keep", action="store_true", help="Leave checkpoints and packages there.")
    parser.add_argument("--label", default="now", help="What the rows are called in the result.")
    parser.add_argument("--table", action="store_true", help="Measure nothing, print the results.")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(OUT.read_text("utf-8"))))
        return
    for name in given.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=given.work) as scratch:
            home = (given.work or Path(scratch)) / name
            if not home.exists():
                write_checkpoint(name, home)
            row = measure(home, Path(scratch) / "package", given.precision, given.route)
            if not given.keep:
                shutil.rmtree(home)
        row = {"label": given.label, "base": name, **row}
        _add(row)
        print(json.dumps(row), flush=True)


def measure(base: Path, package: Path, precision: str, route: str) -> dict[str, Any]:
    """Export as a user does, and watch the process."""
    command = [sys.executable, "-m", "edgeprompt", "export", str(base), "-o", str(package), "--json", "--force"]
    command += ["--precision", precision, "--route", route, "--allow-quality-loss"]
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    anonymous = 0
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, _anonymous(child.pid))
        time.sleep(_OFTEN)
    child.returncode = os.waitstatus_to_exitcode(status)
    text = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise SystemExit(f"the export of {base.name} failed with {child.returncode}")
    made = json.loads(text)
    return {
        "precision": made["precision"],
        "route": made["route"],
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "peak_anonymous_bytes": anonymous,
        "package_bytes": made["size_bytes"],
        "checkpoint_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "machine": describe(),
    }


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(text.split()[1]) * 1024 for text in lines if text.startswith("RssAnon:")), 0)


def _add(row: dict[str, Any]) -> None:
    rows = json.loads(OUT.read_text("utf-8")) if OUT.exists() else []
    key = [row[name] for name in ("label", "base", "precision", "route")]
    rows = [other for other in rows if [other[name] for name in ("label", "base", "precision", "route")] != key]
    OUT.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each export."""
    lines = [
        "| base (random weights, bf16) | | checkpoint | package | processor time | peak resident | peak anonymous |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['base']} | {row['precision']}, {row['route']} ({row['label']}) "
        f"| {row['checkpoint_bytes'] / 1e9:.2f} GB | {row['package_bytes'] / 1e9:.2f} GB "
        f"| {row['cpu_seconds']:.0f} s | {row['peak_rss_bytes'] / 1e9:.2f} GB "
        f"| {row['peak_anonymous_bytes'] / 1e9:.2f} GB |"
        for row in rows
    ]
    return "\n".join([*lines, "", line(rows[-1]["machine"])])


if __name__ == "__main__":
    main()
