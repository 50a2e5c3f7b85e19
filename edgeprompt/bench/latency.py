"""What is measured inside one process, through the public runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgeprompt import names
from edgeprompt.bench.device import usable_cores
from edgeprompt.bench.energy import EnergyMeter
from edgeprompt.bench.options import BenchOptions
from edgeprompt.bench.report import Result
from edgeprompt.bench.reuse import Reuse
from edgeprompt.bench.workload import another_like, headless, instruction_of, text_of
from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.options import EngineOptions
from edgeprompt.package.folder import Package
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.hard_prompt import hard_prompt
from edgeprompt.request import Generation, GenerationOptions, Request
from edgeprompt.runtime import Runtime

WORKER_ROWS = 16
"""Texts of one call for each worker."""
_OTHER, _NONE, _HARD = "bench other", "bench none", "bench hard"


def check_lengths(package: Package, prompt: PromptFile, options: BenchOptions) -> None:
    """Refuse what the base does not hold, before minutes of work.

    Raises:
        InputError: names the lengths and the limit.
    """
    manifest = package.manifest
    limit, longest = manifest.geometry.max_positions, max(options.input_tokens)
    new = 0 if manifest.architecture == names.ENCODER_ONLY else options.new_tokens
    around = prompt.num_virtual_tokens + len(package.tokenizer.encode(instruction_of(prompt)))
    if limit and around + longest + new > limit:
        raise InputError(
            f"{longest} input and {new} new tokens with prompt {prompt.name!r} exceed the {limit} positions of the "
            "base; lower --input-tokens or --new-tokens"
        )


class Latency:
    """Measures one package with one provider and number of threads."""

    def __init__(self, package: Package, options: BenchOptions, provider: str, threads: int | None) -> None:
        self._options, self._threads = options, threads
        self._encoder = package.manifest.architecture == names.ENCODER_ONLY
        self._cached = package.manifest.architecture == names.DECODER_ONLY
        self._tokenizer = package.tokenizer
        # Ending early would measure fewer tokens than asked: no token ends a text here.
        tokens = dataclasses.replace(package.manifest.tokens, eos=())
        self._package = Package(package.path, dataclasses.replace(package.manifest, tokens=tokens))
        self._settings = EngineOptions(
            provider=provider,
            threads=threads,
            max_batch=max(16, *options.batch),
            allow_other_weights=True,
            reuse_texts=False,  # the same texts are measured again and again
        )
        self.provider = provider

    def measure(self, prompts: dict[Path, PromptFile], tell: Callable[[str], None]) -> Iterator[Result]:
        """All tests, one after another; `tell` hears the name of each stage."""
        tell("load")
        yield self._warm_load()
        runtime = Runtime(self._package, self._settings)
        self.provider = runtime.provider
        with runtime:
            for file, prompt in prompts.items():
                tell("add prompt")
                yield self._add_prompt(runtime, file, prompt)
                tell("time to first token")
                yield from self._first(runtime, prompt)
                yield self._swap(runtime, prompt)
                if not self._encoder:
                    tell("decode")
                    yield from self._generation(runtime, prompt)
                tell("classify")
                yield from self._throughput(runtime, prompt, self._options.batch)
            if not self._encoder:
                tell("prefill")
                yield from self._prefill(runtime)
        if self._cached:
            tell("prompt run again")
            yield from self._run_again(prompts)
            tell("computed once")
            yield from Reuse(
                self._package, dataclasses.replace(self._settings, provider=self.provider), self._options
            ).measure()
        workers = self._threads or usable_cores()
        if self.provider == "cpu" and workers > 1:
            tell("workers")
            with Runtime(self._package, dataclasses.replace(self._settings, threads=None, workers=workers)) as runtime:
                for prompt in prompts.values():
                    runtime.add_prompt(prompt)
                    yield from self._throughput(runtime, prompt, (WORKER_ROWS * workers,), "_workers")

    def _warm_load(self) -> Result:
        def load() -> None:
            Runtime(self._package, self._settings).close()

        return self._result("warm_load", _times(load, self._options.repetitions, max(1, self._options.warmup)))

    def _add_prompt(self, runtime: Runtime, file: Path, prompt: PromptFile) -> Result:
        samples = []
        for number in range(self._options.warmup + self._options.repetitions):
            if number:
                runtime.remove_prompt(prompt.name)
            started = time.perf_counter_ns()
            runtime.add_prompt(file)
            samples.append(time.perf_counter_ns() - started)
        return self._result("add_prompt", samples[self._options.warmup :], prompt, n_depth=self._depth(prompt))

    def _first(self, runtime: Runtime, prompt: PromptFile) -> Iterator[Result]:
        """Time to the first token (encoders: to the answer), variants alternating."""
        asks: dict[str, tuple[Callable[[str], int], int]]
        if self._encoder:
            instruction = instruction_of(prompt)
            asks = {
                "latency_prompt": (lambda text: self._answer(runtime, Request(text, prompt.name)), 0),
                "latency_none": (lambda text: self._embed(runtime, text), 0),
                "latency_hard": (lambda text: self._embed(runtime, instruction + text), 0),
            }
        else:
            bare = headless(prompt)
            runtime.add_prompt(hard_prompt(bare, "", name=_NONE))
            runtime.add_prompt(hard_prompt(bare, instruction_of(prompt), name=_HARD))
            asks = {
                "ttft_cached" if self._cached else "ttft_prompt": (
                    self._asker(runtime, prompt.name),
                    self._depth(prompt),
                ),
                "ttft_none": (self._asker(runtime, _NONE), 0),
                "ttft_hard": (self._asker(runtime, _HARD), 0),
            }
        for count in self._options.input_tokens:
            samples: dict[str, list[int]] = {test: [] for test in asks}
            lengths: dict[str, int] = {}
            for number in range(self._options.warmup + self._options.repetitions):
                text = text_of(self._tokenizer, count, shift=number)
                for test, (ask, _) in asks.items():
                    started = time.perf_counter_ns()
                    lengths[test] = ask(text)
                    samples[test].append(time.perf_counter_ns() - started)
            for test, (_, depth) in asks.items():
                kept = samples[test][self._options.warmup :]
                length = count if test != "ttft_hard" else lengths[test]
                yield self._result(test, kept, prompt, n_prompt=length, n_gen=0 if self._encoder else 1, n_depth=depth)

    def _run_again(self, prompts: dict[Path, PromptFile]) -> Iterator[Result]:
        """Time to first token where no prefix stays resident; a runtime of its own, after the other is closed."""
        with Runtime(self._package, dataclasses.replace(self._settings, prefix_budget=0)) as runtime:
            for prompt in prompts.values():
                runtime.add_prompt(prompt)
                ask = self._asker(runtime, prompt.name)
                for count in self._options.input_tokens:
                    text = text_of(self._tokenizer, count)
                    samples = _times(lambda: ask(text), self._options.repetitions, self._options.warmup)  # noqa: B023
                    yield self._result("ttft_rerun", samples, prompt, n_prompt=count, n_gen=1)

    def _swap(self, runtime: Runtime, prompt: PromptFile) -> Result:
        """Pairs of requests of one task, each pair of another task than the last: first minus second."""
        runtime.add_prompt(another_like(prompt, _OTHER, 0))
        text = text_of(self._tokenizer, self._options.input_tokens[0])
        samples = []
        for number in range(self._options.warmup + self._options.repetitions):
            name = (prompt.name, _OTHER)[number % 2]
            swapped, same = _times(lambda: self._answer(runtime, self._one(text, name)), 2, 0)  # noqa: B023
            samples.append(swapped - same)
        return self._result("swap", samples[self._options.warmup :], prompt, n_tasks=2)

    def _prefill(self, runtime: Runtime) -> Iterator[Result]:
        for count in self._options.input_tokens:
            ids = self._tokenizer.encode(text_of(self._tokenizer, count), add_special_tokens=False)
            request = Request(input_ids=ids, options=GenerationOptions(max_new_tokens=1), task="generate")
            samples = _times(lambda: runtime.run([request]), self._options.repetitions, self._options.warmup)  # noqa: B023
            speeds = [len(ids) * 1e9 / sample for sample in samples]
            yield self._result("prefill", speeds, unit="tokens/s", n_prompt=len(ids))

    def _generation(self, runtime: Runtime, prompt: PromptFile) -> Iterator[Result]:
        options = GenerationOptions(max_new_tokens=self._options.new_tokens, temperature=0, drafts=False)
        count = self._options.input_tokens[0]
        meter = EnergyMeter(self.provider)
        for rows in self._options.batch:
            requests = [
                Request(text_of(self._tokenizer, count, shift=row), prompt.name, task="generate", options=options)
                for row in range(rows)
            ]
            tpot: list[float] = []
            speeds: list[float] = []
            joules: list[float] = []
            digest = hashlib.sha256()
            for number in range(self._options.warmup + self._options.repetitions):
                before = meter.read()
                found = cast(list[Generation], runtime.run(requests))
                used = meter.since(before)
                if number == 0:
                    for row in found:
                        digest.update(np.asarray(row.token_ids, "<i8").tobytes())
                if number < self._options.warmup:
                    continue
                new = sum(row.timings.new_tokens for row in found)
                tpot += [row.timings.tpot * 1e9 for row in found if row.timings.tpot is not None]
                lasted = max(row.timings.total for row in found) - min(row.timings.ttft for row in found)
                if lasted > 0 and new > rows:
                    speeds.append((new - rows) / lasted)
                if used is not None:
                    joules.append(used / new)
            setting: dict[str, Any] = {
                "n_prompt": count,
                "n_gen": self._options.new_tokens,
                "n_depth": self._depth(prompt),
            }
            setting["batch_size"] = rows
            yield self._result("tpot", tpot, prompt, **setting)
            yield self._result("decode", speeds, prompt, unit="tokens/s", output_hash=digest.hexdigest(), **setting)
            yield self._result("energy", joules, prompt, unit="J/token", **setting)
            if rows == 1:
                yield self._result("itl", self._gaps(runtime, requests[0]), prompt, **setting)
                yield from self._drafted(runtime, requests[0], prompt, setting)

    def _drafted(
        self, runtime: Runtime, request: Request, prompt: PromptFile, setting: dict[str, Any]
    ) -> Iterator[Result]:
        """Decoding again, with drafts from the text; nothing where they cannot be had."""
        request = dataclasses.replace(request, options=dataclasses.replace(request.options, drafts=True))
        speeds, drafted, accepted = list[float](), list[float](), list[float]()
        try:
            for number in range(self._options.warmup + self._options.repetitions):
                timings = cast(list[Generation], runtime.run([request]))[0].timings
                if number >= self._options.warmup and timings.tpot:
                    speeds.append(1 / timings.tpot)
                    drafted.append(timings.drafted_tokens)
                    accepted.append(timings.accepted_tokens)
        except UnsupportedError:
            return
        yield self._result("decode_drafts", speeds, prompt, unit="tokens/s", **setting)
        yield self._result("drafted_tokens", drafted, prompt, unit="tokens", **setting)
        yield self._result("accepted_tokens", accepted, prompt, unit="tokens", **setting)

    def _gaps(self, runtime: Runtime, request: Request) -> list[int]:
        """Nanoseconds between streamed pieces."""
        gaps = []
        for _ in range(self._options.repetitions):
            last = None
            for _piece in runtime.stream(request):
                now = time.perf_counter_ns()
                if last is not None:
                    gaps.append(now - last)
                last = now
        return gaps

    def _throughput(
        self, runtime: Runtime, prompt: PromptFile, batches: Sequence[int], suffix: str = ""
    ) -> Iterator[Result]:
        """Texts per second: labelled where the prompt has labels, else embedded (encoders)."""
        count = self._options.input_tokens[0]
        labels = bool(prompt.verbalizer or prompt.head_spec)
        if not labels and not self._encoder:
            return
        for rows in batches:
            texts = [text_of(self._tokenizer, count, shift=row) for row in range(rows)]
            requests = [Request(text, prompt.name, task=None if labels else "embed") for text in texts]
            samples = _times(lambda: runtime.run(requests), self._options.repetitions, self._options.warmup)  # noqa: B023
            speeds = [rows * 1e9 / sample for sample in samples]
            test = ("classify" if labels else "embed") + suffix
            depth = self._depth(prompt)
            yield self._result(test, speeds, prompt, unit="examples/s", n_prompt=count, batch_size=rows, n_depth=depth)

    def _one(self, text: str, name: str) -> Request:
        if self._encoder:
            return Request(text, name)
        return Request(text, name, task="generate", options=GenerationOptions(max_new_tokens=1, temperature=0))

    def _asker(self, runtime: Runtime, name: str) -> Callable[[str], int]:
        return lambda text: self._answer(runtime, self._one(text, name))

    def _answer(self, runtime: Runtime, request: Request) -> int:
        """Ask; the number of input tokens, where the answer tells it."""
        (found,) = runtime.run([request])
        timings = getattr(found, "timings", None)
        return timings.input_tokens if timings is not None else 0

    def _embed(self, runtime: Runtime, text: str) -> int:
        runtime.embed([text])
        return 0

    def _depth(self, prompt: PromptFile) -> int:
        """Tokens that are cached in front of the text: a prompt inside or behind it has none there."""
        deep = prompt.past_key_values is not None
        leads = not prompt.is_infix if deep else prompt.template.prompt_is_prefix
        return prompt.num_virtual_tokens if self._cached and leads else 0

    def _result(
        self, test: str, samples: Sequence[float], prompt: PromptFile | None = None, *, unit: str = "ns", **setting: Any
    ) -> Result:
        name = prompt.name if prompt else None
        return Result(test, unit, tuple(samples), name, self.provider, self._threads, **setting)


def _times(work: Callable[[], Any], repetitions: int, warmup: int) -> list[int]:
    """Nanoseconds that each repetition takes."""
    samples = []
    for number in range(warmup + repetitions):
        started = time.perf_counter_ns()
        work()
        if number >= warmup:
            samples.append(time.perf_counter_ns() - started)
    return samples
