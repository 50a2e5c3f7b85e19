"""What only a process of its own can show: cold start, and memory as tasks grow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprompt.bench.options import BenchOptions
from edgeprompt.bench.report import Result
from edgeprompt.bench.workload import another_like
from edgeprompt.errors import EdgePromptError, InputError
from edgeprompt.package.folder import Package
from edgeprompt.prompts.file import PromptFile, save_prompt

TEXT = "It works."


def cold_start(package: Package, prompt: PromptFile, file: Path, options: BenchOptions) -> Iterator[Result]:
    """Start a process, wait for its first answer, `repetitions` times."""
    samples = []
    for number in range(options.warmup + options.repetitions):
        started = time.perf_counter_ns()
        _work("first", package, file, options)
        if number >= options.warmup:
            samples.append(time.perf_counter_ns() - started)
    yield Result("cold_start", "ns", tuple(samples), prompt.name, options.providers[0], options.threads[0])


def memory(package: Package, prompt: PromptFile, file: Path, options: BenchOptions) -> Iterator[Result]:
    """Peak memory with each number of tasks: prompts of the shape of `prompt`, every one with other values."""
    disk = file.stat().st_size
    largest = max(options.tasks)
    setting: dict[str, Any] = {
        "prompt": prompt.name,
        "provider": options.providers[0],
        "n_threads": options.threads[0],
    }
    yield Result("prompt_disk", "bytes", (disk,), **setting)
    with tempfile.TemporaryDirectory(prefix="edgeprompt-bench-") as scratch:
        if disk * largest > shutil.disk_usage(scratch).free // 2:
            raise InputError(
                f"{largest} prompts of {disk} bytes do not fit into {scratch!r}; lower --tasks, or set TMPDIR"
            )
        folder = Path(scratch)
        anonymous: dict[int, int] = {}
        there = 0
        for count in sorted(set(options.tasks)):
            for number in range(there, count):
                name = f"task{number:06}"
                save_prompt(another_like(prompt, name, number), folder / f"{name}.safetensors")
            there = count
            found = _work("memory", package, folder, options)
            if found["peak"] is not None:
                yield Result("peak_rss", "bytes", (found["peak"],), n_tasks=count, **setting)
            for part, size in found["peak_split"].items():
                yield Result(f"peak_rss_{part}", "bytes", (size,), n_tasks=count, **setting)
            if found["now"]:
                anonymous[count] = found["now"]["anonymous"]
    if len(anonymous) > 1:
        (few, small), (many, large) = sorted(anonymous.items())[:2]
        growth = max(0, large - small) / (many - few)
        yield Result("prompt_resident", "bytes", (growth,), n_tasks=many, **setting)


def _work(job: str, package: Package, prompts: Path, options: BenchOptions) -> Any:
    """The worker's answer.

    Raises:
        EdgePromptError: the worker failed; its last line says why.
    """
    command = [
        *(sys.executable, "-m", "edgeprompt.bench.worker", job),
        *("--package", str(package.path.absolute()), "--prompts", str(prompts.absolute()), "--text", TEXT),
        *("--provider", options.providers[0]),
        *(("--threads", str(options.threads[0])) if options.threads[0] else ()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if not line:
            said = process.stderr.read().strip().splitlines()
            raise EdgePromptError(f"the measuring process failed: {said[-1] if said else process.wait()}")
        found = json.loads(line)
        if job == "first":
            process.kill()
    return found
