"""Prompts that are added, replaced and removed in any order while requests run, against a model of what is served."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import edgeprompt
from edgeprompt import PromptFile, PromptNotFoundError, Request, Runtime
from edgeprompt.prompts.file import save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

NAMES = ("one", "two", "three")
SEEDS = 4


class Machine(RuleBasedStateMachine):
    """Added prompts hide those of the folder. A request answers by the prompt that its name had when it was made."""

    runtime: Runtime
    folder: Path
    prompts: list[PromptFile]
    expected: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.added: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.flights: list[tuple[Any, int]] = []
        for path in self.folder.glob("*"):
            path.unlink()

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, SEEDS - 1))
    def add(self, name: str, seed: int) -> None:
        self.runtime.add_prompt(self.prompts[seed], name=name)
        self.added[name] = seed

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, SEEDS - 1))
    def write(self, name: str, seed: int) -> None:
        save_prompt(self.prompts[seed], self.folder / f"{name}.safetensors")
        self.files[name] = seed

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
        self.files.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        """Of a prompt from the folder it makes the next request read the file again."""
        try:
            self.runtime.remove_prompt(name)
        except PromptNotFoundError:
            assert name not in self.added
        self.added.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        seed = self.added.get(name, self.files.get(name))
        request = Request("a film", name, task="logits")
        if seed is None:
            with pytest.raises(PromptNotFoundError):
                self.runtime.submit(request)
        else:
            self.flights.append((self.runtime.submit(request), seed))

    @invariant()
    def names_are_those_that_are_served(self) -> None:
        assert set(self.runtime.prompts) >= {*self.added, *self.files}
        for name in NAMES:
            if name not in self.added and name not in self.files:
                with pytest.raises(PromptNotFoundError):
                    self.runtime.prompt(name)

    @invariant()
    def nothing_derived_outlives_its_prompt(self) -> None:
        if not self.flights:
            assert not [key for key in self.runtime._engine.derived._entries if key[0].removed]

    @rule()
    def look(self) -> None:
        for job, seed in self.flights:
            assert (job.result(20) == self.expected[seed]).all()
        self.flights.clear()

    def teardown(self) -> None:
        self.look()
        self.nothing_derived_outlives_its_prompt()
        for name in list(self.added):
            self.runtime.remove_prompt(name)


def test_any_order_of_adding_replacing_and_removing(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        Machine.runtime, Machine.folder = runtime, tmp_path
        Machine.prompts = [make_prompt(runtime.manifest, "any", seed=seed) for seed in range(SEEDS)]
        Machine.expected = []
        for prompt in Machine.prompts:
            runtime.add_prompt(prompt)
            Machine.expected.append(runtime.logits("a film", prompt="any"))
        runtime.remove_prompt("any")
        runtime.add_folder(tmp_path)
        quick = settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        )
        run_state_machine_as_test(Machine, settings=quick)


def test_a_prompt_that_is_read_while_it_is_removed_is_there_or_not_found(runtime: Runtime) -> None:
    """`Runtime.prompt` looked twice, and raised KeyError in between."""
    prompt = make_prompt(runtime.manifest, "blink")
    stop, wrong = threading.Event(), list[BaseException]()

    def read() -> None:
        while not stop.is_set():
            try:
                assert runtime.prompt("blink").name == "blink"
            except PromptNotFoundError:
                pass
            except BaseException as error:
                wrong.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(150):
        runtime.add_prompt(prompt)
        runtime.remove_prompt("blink")
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
