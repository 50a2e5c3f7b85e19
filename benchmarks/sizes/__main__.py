"""What an export of bases of true sizes takes: processor time, peak memory, the package's size.

    python -m benchmarks.sizes [--sizes llama-3.2-1b,llama-3.2-3b] [--precision int4] [--use] [--work FOLDER]

Each base is written with random weights (`benchmarks.sizes.checkpoints`), exported by `edgeprompt export` in a process
of its own, and deleted. Peak memory is the process's peak resident memory (the weights' mapped pages count there) and,
apart, the most anonymous memory that was seen, sampled twenty times a second. With --use, the package then decodes 16
tokens, and a prompt of 16 tokens is tuned on the base for one step of one text, each in a process. Rows are added to
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
from benchmarks.sizes.checkpoints import SIZES, architecture_of, write_checkpoint
from edgeprompt import names

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "sizes.json"
PRECISIONS = {names.DECODER_ONLY: "int4"}
TEMPLATES = {names.DECODER_ONLY: "{prompt}{text}\nSentiment:", names.ENCODER_DECODER: "{prompt}{text}"}
_OFTEN = 0.05


def main() -> None:
    """Measure the sizes asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="llama-3.2-1b", help=f"Of {', '.join(SIZES)}; with commas.")
    parser.add_argument("--precision", help="Default: int4; int8 of encoders and encoder-decoders.")
    parser.add_argument("--route", default="auto")
    parser.add_argument("--work", type=Path, help="Where checkpoints and packages lie meanwhile.")
    parser.add_argument("--keep", action="store_true", help="Leave checkpoints and packages there.")
    parser.add_argument("--use", action="store_true", help="Decode with the package and tune on the base, too.")
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
            package = (given.work if given.keep and given.work else Path(scratch)) / f"{name}-package"
            kind = architecture_of(name)
            row = measure(home, package, given.precision or PRECISIONS.get(kind, "int8"), given.route)
            if given.use:
                row |= {"decode": decode(package, kind), "tune": tune(home, Path(scratch), kind)}
            if not given.keep:
                shutil.rmtree(home)
        row = {"label": given.label, "base": name, **row}
        _add(row)
        print(json.dumps(row), flush=True)


def measure(base: Path, package: Path, precision: str, route: str) -> dict[str, Any]:
    """Export as a user does, and watch the process."""
    output, figures = _watch(
        "export", base, "-o", package, "--json", "--force", "--precision", precision, "--route", route,
        "--allow-quality-loss",
    )  # fmt: skip
    made = json.loads(output)
    return {
        "precision": made["precision"],
        "route": made["route"],
        **figures,
        "package_bytes": made["size_bytes"],
        "checkpoint_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "machine": describe(),
    }


def decode(package: Path, kind: str = names.DECODER_ONLY) -> dict[str, Any]:
    """16 greedy tokens behind a short text; of an encoder, its embedding."""
    output, figures = _watch("run", package, "The film starts slowly, but", "--max-new-tokens", "16", "--json")
    answer = json.loads(output.splitlines()[0])
    return {**figures, "tokens": 0 if kind == names.ENCODER_ONLY else len(answer["token_ids"])}


def tune(base: Path, folder: Path, kind: str = names.DECODER_ONLY) -> dict[str, Any]:
    """One step of a prompt of 16 tokens on one text of two; of an encoder, with a head."""
    data, checked = folder / "train.csv", folder / "eval.csv"
    data.write_text("text,label\nA fine film.,good\nA dull film.,bad\n", encoding="utf-8")
    checked.write_text("text,label\nA warm film.,good\nA long film.,bad\n", encoding="utf-8")
    words = ("--verbalizer", "good= good", "--verbalizer", "bad= bad", "--template", TEMPLATES.get(kind, ""))
    _, figures = _watch(
        "tune", base, data, "-o", folder / "prompt.safetensors", "--eval", checked, "--steps", "1", "--batch-size", "1",
        "--virtual-tokens", "16", *(words if kind in TEMPLATES else ()),
    )  # fmt: skip
    return figures


def _watch(*words: object) -> tuple[str, dict[str, Any]]:
    """An edgeprompt command's output, and what its process took."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edgeprompt", *map(str, words)]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    anonymous = 0
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, _anonymous(child.pid))
        time.sleep(_OFTEN)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.stdout is not None
    with child.stdout as stdout:
        text = stdout.read()
    if child.returncode:
        raise SystemExit(f"edgeprompt {words[0]} {words[1]} failed with {child.returncode}")
    return text, {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "peak_anonymous_bytes": anonymous,
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
    """Markdown: one line for each export, and what its package and a tuning step took."""
    lines = [
        "| base (random weights, bf16) | | checkpoint | package | processor time | peak resident | peak anonymous "
        "| decoding: peak resident (anonymous) | a tuning step: peak resident (anonymous) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['base']} | {row['precision']}, {row['route']} ({row['label']}) "
        f"| {row['checkpoint_bytes'] / 1e9:.2f} GB | {row['package_bytes'] / 1e9:.2f} GB "
        f"| {row['cpu_seconds']:.0f} s | {row['peak_rss_bytes'] / 1e9:.2f} GB "
        f"| {row['peak_anonymous_bytes'] / 1e9:.2f} GB | {_peak(row.get('decode'))} | {_peak(row.get('tune'))} |"
        for row in rows
    ]
    return "\n".join([*lines, "", line(rows[-1]["machine"])])


def _peak(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "not measured"
    return f"{figures['peak_rss_bytes'] / 1e9:.2f} GB ({figures['peak_anonymous_bytes'] / 1e9:.2f})"


if __name__ == "__main__":
    main()
