"""Latency benchmarks of a package: `edgeprompt bench`. Needs the runtime install only."""

from edgeprompt.bench.compare import compare
from edgeprompt.bench.options import BenchOptions
from edgeprompt.bench.report import Report, load_report
from edgeprompt.bench.run import run_bench

__all__ = ["BenchOptions", "Report", "compare", "load_report", "run_bench"]
