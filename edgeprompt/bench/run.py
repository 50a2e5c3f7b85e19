"""The whole run, in order: processes first, then everything inside this one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

from edgeprompt.bench import processes
from edgeprompt.bench.device import clock, describe_device, throttling
from edgeprompt.bench.latency import Latency, check_lengths
from edgeprompt.bench.options import BenchOptions
from edgeprompt.bench.report import Report, Result
from edgeprompt.bench.workload import prompt_files
from edgeprompt.errors import InputError
from edgeprompt.ort.session import choose_provider
from edgeprompt.package.folder import open_package

Progress = Callable[[str, float], None]


def run_bench(
    path: str | os.PathLike[str], options: BenchOptions | None = None, *, progress: Progress | None = None
) -> Report:
    """Measure a package on this device.

    Args:
        path: the package.
        options: what to measure; None: the defaults.
        progress: called with a stage's name and the fraction done.

    Raises:
        PackageError: no package, or a broken one.
        BaseMismatchError: a prompt was made for another base.
        InputError: lengths that the base does not hold, or a number below 1.
        ProviderError: a provider is not there.
    """
    options = options or BenchOptions()
    _check(options)
    package = open_package(path)
    _ = package.tokenizer  # a broken one is said now, not by a process that is measured
    options = dataclasses.replace(options, providers=tuple(choose_provider(name)[0] for name in options.providers))
    settings = list(product(options.providers, options.threads))
    results: list[Result] = []
    device = describe_device()
    with prompt_files(package, options.prompts) as prompts:
        for prompt in prompts.values():
            check_lengths(package, prompt, options)
        total, done = 2 + len(settings) * (4 + 4 * len(prompts)), 0

        def tell(stage: str) -> None:
            nonlocal done
            if progress is not None:
                progress(stage, min(1.0, done / total))
            done += 1

        before = clock()
        file, prompt = next(iter(prompts.items()))
        tell("cold start")
        results += processes.cold_start(package, prompt, file, options)
        tell("memory")
        results += processes.memory(package, prompt, file, options)
        for provider, threads in settings:
            results += Latency(package, options, provider, threads).measure(prompts, tell)
    manifest = package.manifest
    return Report(
        device=device,
        package={
            "path": Path(path).name,
            "model": manifest.base.name,
            "base": manifest.base.fingerprint,
            "architecture": manifest.architecture,
            "precision": manifest.precision,
            "block_size": manifest.extra.get("block_size"),
            "route": manifest.route,
            "hash": manifest.weights_hash,
            "size_bytes": sum(
                (package.path / name).stat().st_size
                for graph in manifest.graphs.values()
                for name in (graph.file, *graph.data)
            ),
            "onnxruntime": device["versions"].get("onnxruntime") or device["versions"].get("onnxruntime-gpu"),
            "prompts": {prompt.name: prompt.sha256 for prompt in prompts.values()},
        },
        throttling=throttling(before, clock()),
        test_time=datetime.now(UTC).isoformat(timespec="seconds"),
        results=tuple(results),
        settings={**dataclasses.asdict(options), "prompts": [prompt.name for prompt in prompts.values()]},
    )


def _check(options: BenchOptions) -> None:
    for name in ("input_tokens", "batch", "tasks", "threads", "providers"):
        values = getattr(options, name)
        if not values or any(isinstance(value, int) and value < 1 for value in values):
            raise InputError(f"{name} is {list(values)}; give at least one value, each at least 1")
    for name, least in (("new_tokens", 2), ("repetitions", 1), ("warmup", 0)):
        if getattr(options, name) < least:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least {least}")
