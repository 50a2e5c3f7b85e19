"""What a decoder computes once: several tasks over one text, a chat, a long instruction.

Each is measured in a runtime that keeps texts, which is the default, and in one that does not, alternating.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from edgeprompt.bench.options import BenchOptions
from edgeprompt.bench.report import Result
from edgeprompt.bench.workload import another_like, synthetic_prompt, text_of
from edgeprompt.errors import MissingDependencyError, UnsupportedError
from edgeprompt.options import EngineOptions
from edgeprompt.package.folder import Package
from edgeprompt.prompts.hard_prompt import hard_prompt
from edgeprompt.prompts.template import Template
from edgeprompt.request import Generation, GenerationOptions, Message, Request
from edgeprompt.runtime import Runtime

TASKS, TURNS, TURN_TOKENS, INSTRUCTION_TOKENS = 8, 10, 16, 256
"""Tasks over one text; turns of a chat; new tokens of a turn; tokens of the instruction."""
QUESTION = "What do you think of it, and why?"
_TURN_LENGTH = 64
"""Tokens of a turn at most, with its answer and the template's own."""
_AROUND = 48
"""Positions for virtual tokens, and for what a template adds, at most."""
_FIRST = GenerationOptions(max_new_tokens=1, temperature=0)
_Ask = Callable[[Runtime, int], int]


class Reuse:
    """Measures one package with one provider and number of threads."""

    def __init__(self, package: Package, settings: EngineOptions, options: BenchOptions) -> None:
        """`settings`: without `reuse_texts`."""
        self._package, self._settings, self._options = package, settings, options
        self._tokenizer = package.tokenizer

    def measure(self) -> Iterator[Result]:
        """The three, without those that the base has no room or no chat template for."""
        room = self._package.manifest.geometry.max_positions or 1 << 30
        kept_settings = dataclasses.replace(self._settings, reuse_texts=True)
        with Runtime(self._package, kept_settings) as kept, Runtime(self._package, self._settings) as nothing:
            for runtime in (kept, nothing):
                self._add_prompts(runtime)
            for count in self._options.input_tokens:
                if count + _AROUND <= room:
                    yield from self._both("tasks", self._tasks(count), kept, nothing, n_prompt=count, n_tasks=TASKS)
                if count + INSTRUCTION_TOKENS + _AROUND <= room:
                    yield from self._both("instruction", self._instruction(count), kept, nothing, n_prompt=count)
            if room >= TURNS * _TURN_LENGTH:
                yield from self._chat(kept, nothing)

    def _add_prompts(self, runtime: Runtime) -> None:
        prompt = synthetic_prompt(self._package)
        for number in range(TASKS):
            task = another_like(prompt, f"task {number}", number)
            template = Template.parse(f"{{text}}{{prompt}}\nTask {number}:")
            runtime.add_prompt(dataclasses.replace(task, template=template))
        instruction = text_of(self._tokenizer, INSTRUCTION_TOKENS) + "\n"
        runtime.add_prompt(hard_prompt(prompt, instruction, name="instruction"))

    def _tasks(self, count: int) -> _Ask:
        def ask(runtime: Runtime, number: int) -> int:
            text = text_of(self._tokenizer, count, shift=number)
            asked = [Request(text, f"task {task}", task="generate", options=_FIRST) for task in range(TASKS)]
            started = time.perf_counter_ns()
            runtime.run(asked)
            return time.perf_counter_ns() - started

        return ask

    def _instruction(self, count: int) -> _Ask:
        def ask(runtime: Runtime, number: int) -> int:
            text = text_of(self._tokenizer, count, shift=number)
            started = time.perf_counter_ns()
            runtime.run([Request(text, "instruction", task="generate", options=_FIRST)])
            return time.perf_counter_ns() - started

        return ask

    def _both(self, test: str, ask: _Ask, kept: Runtime, nothing: Runtime, **setting: int) -> Iterator[Result]:
        samples: dict[str, list[int]] = {f"{test}_reused": [], f"{test}_computed": []}
        # The first request computes what all later ones have in common.
        for number in range(max(1, self._options.warmup) + self._options.repetitions):
            for name, runtime in zip(samples, (kept, nothing), strict=True):
                samples[name].append(ask(runtime, number))
        for name, taken in samples.items():
            yield self._result(name, taken[-self._options.repetitions :], n_gen=1, **setting)

    def _chat(self, kept: Runtime, nothing: Runtime) -> Iterator[Result]:
        """Time to the first token of the second and the last turn."""
        samples: dict[str, list[int]] = {
            f"chat_turn_{turn}_{way}": [] for turn in (2, TURNS) for way in ("reused", "computed")
        }
        try:
            for number in range(self._options.repetitions):
                told = text_of(self._tokenizer, _TURN_LENGTH // 4, shift=number)
                messages: list[Message] = [{"role": "user", "content": told}]
                for turn in range(1, TURNS + 1):
                    found = kept.chat(messages, max_new_tokens=TURN_TOKENS, temperature=0)
                    if turn in (2, TURNS):
                        alone = nothing.chat(messages, max_new_tokens=1, temperature=0)
                        samples[f"chat_turn_{turn}_reused"].append(_first(found))
                        samples[f"chat_turn_{turn}_computed"].append(_first(alone))
                    messages += [{"role": "assistant", "content": found.text}, {"role": "user", "content": QUESTION}]
        except (MissingDependencyError, UnsupportedError):  # no Jinja, or no template
            return
        for name, taken in samples.items():
            yield self._result(name, taken, n_gen=1)

    def _result(self, test: str, samples: list[int], **setting: Any) -> Result:
        return Result(test, "ns", tuple(samples), None, self._settings.provider, self._settings.threads, **setting)


def _first(found: Generation) -> int:
    return int(found.timings.ttft * 1e9)
