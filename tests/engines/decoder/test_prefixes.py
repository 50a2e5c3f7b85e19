"""Texts that begin alike share keys and values: the answers are those of computing all, to the last bit at fp32."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions, Request, Runtime
from edgeprompt.bench.memory import split_rss
from edgeprompt.engines.decoder.graph import BLOCK
from edgeprompt.engines.decoder.head import ReadState
from edgeprompt.prompts.template import Template
from edgeprompt.request import GenerationOptions
from tests.support.packages import growing_package
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

WORDS = {"x": (" good", " good story"), "y": (" bad", " never ever made")}
FIRST = "the film was long and the story of a man who went home was never very good but the actors were "
SECOND = "nobody had seen it before, and nobody will see it again, not in a hundred years of films and stories "
PROMPTS = (None, "front", "behind", "other", "deep", "inside", "infix", "infix too")


def add_prompts(runtime: Runtime) -> None:
    plan: dict[str, dict[str, Any]] = {
        "front": {"template": "{prompt}{text}\nA:"},
        "behind": {"template": "{text}{prompt}\nA:", "seed": 1},
        "other": {"template": "{text}{prompt}\nA:", "seed": 2},
        "deep": {"template": "{text}\nA:", "method": "prefix-tuning", "seed": 3},
        "infix": {"template": "{text}{prompt}\nA:", "method": "prefix-tuning", "seed": 5, "is_infix": True},
        "infix too": {"template": "{text}{prompt:2} is{prompt}\nA:", "method": "prefix-tuning", "is_infix": True},
        "inside": {"template": FIRST + "{prompt}{text}\nA:", "seed": 4},
    }
    for name, fields in plan.items():
        template = Template.parse(fields.pop("template"))
        runtime.add_prompt(make_prompt(runtime.manifest, name, verbalizer=WORDS, count=5, template=template, **fields))


def requests(count: int, seed: int) -> list[Request]:
    """Of shared and forked beginnings."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        pieces = rng.choice([(FIRST, SECOND), (FIRST, FIRST), (SECOND, FIRST), (SECOND,)])
        text = "".join(pieces)[: rng.randint(1, 200)]
        text += rng.choice(["", "the end", " so it was", "a"])
        prompt = rng.choice(PROMPTS)
        task = rng.choice(["logits", "generate", "classify"] if prompt else ["logits", "generate"])
        options = GenerationOptions(max_new_tokens=rng.choice((1, 5)), logprobs=True)
        found.append(Request(text, prompt, task=task, options=options))
    return found


def plain(result: Any) -> Any:
    """All of a result but its times, to the last bit."""
    if isinstance(result, np.ndarray):
        return result.tobytes()
    return replace(result, timings=None)


@pytest.fixture(scope="module", params=["in place", "growing"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = request.getfixturevalue("tiny_llama_package")
    return growing_package(found, tmp_path_factory.mktemp("reuse")) if request.param == "growing" else found


def opened(package: Path, **options: Any) -> Runtime:
    runtime = edgeprompt.load(package, options=replace(QUIET, **options))
    add_prompts(runtime)
    return runtime


def block_bytes(runtime: Runtime) -> int:
    size = runtime.manifest.geometry
    return BLOCK * 2 * size.num_layers * size.num_key_value_heads * size.head_size * 4


def alone(package: Path, asked: list[Request]) -> list[Any]:
    """Each request alone, in a runtime that keeps nothing."""
    with opened(package, prefix_budget=0) as runtime:
        found = [runtime.run([request])[0] for request in asked]
        assert not runtime._engine.derived._blocks
        assert all(result.timings.reused_tokens == 0 for result in found if hasattr(result, "timings"))
    return found


@pytest.mark.parametrize("blocks", [8, 36, 40_000])
def test_reuse_is_the_same_to_the_last_bit(package: Path, blocks: int) -> None:
    asked = requests(60, seed=blocks)
    expected = alone(package, asked)
    with opened(package) as runtime:
        size = block_bytes(runtime)
    with opened(package, prefix_budget=blocks * size) as runtime:
        found = [runtime.run([request])[0] for request in asked]
        assert [plain(result) for result in found] == [plain(result) for result in expected]
        timings = [result.timings for result in found if hasattr(result, "timings")]
        assert all(one.reused_tokens + one.computed_tokens == one.input_tokens for one in timings)
        reused = sum(one.reused_tokens for one in timings)
        assert reused > (20 if blocks > 36 else 0) * BLOCK
        assert runtime._engine.derived.size <= runtime._engine.derived.budget


def test_a_last_row_alone_in_its_group_of_attention(package: Path) -> None:
    """Attention takes rows in groups, and one that is alone adds up in another order: blocks must not change which."""
    rng = np.random.default_rng(0)
    first = [int(token) for token in rng.integers(3, 500, 200)]
    with opened(package) as runtime, opened(package, prefix_budget=0) as nothing:
        reused = 0
        for length in (33, 40, 41, 65, 97, 129, 137, 161):
            for shared in (9, 17, 24, 33, 64, 96, length - 2):
                rest = rng.integers(3, 500, max(0, length - shared))
                ids = [*first[: min(shared, length)], *map(int, rest)]
                assert runtime.logits(input_ids=ids).tobytes() == nothing.logits(input_ids=ids).tobytes(), (
                    length,
                    shared,
                )
            found = runtime.generate(input_ids=[*first[: length + 1], 5], max_new_tokens=1).timings
            reused += found.reused_tokens
        assert reused > 8 * BLOCK


def test_tasks_over_one_text_read_it_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FIRST + SECOND)[:180]
    with opened(package, prefix_budget=0) as runtime:
        expected = runtime.run_tasks(text, ["behind", "other"])
    with opened(package) as runtime:
        graph: Any = runtime._engine._lanes[0].graph  # type: ignore[attr-defined]
        real, lengths = graph.prefill, []
        monkeypatch.setattr(
            graph, "prefill", lambda row, ids, *rest: (lengths.append(len(ids)), real(row, ids, *rest))[1]
        )
        found: Any = runtime.run_tasks(text, ["behind", "other"])
        first, second = (found[name].timings for name in found)
        assert first.reused_tokens == 0
        assert second.reused_tokens == (len(runtime._package.tokenizer.encode(text)) // BLOCK) * BLOCK > 0
        # A growing graph runs decode steps, of one token, in the same way.
        assert [length for length in lengths if length > 1] == [first.input_tokens, second.computed_tokens]
        assert {name: plain(result) for name, result in found.items()} == {
            name: plain(result) for name, result in expected.items()
        }
        assert found["behind"].scores != found["other"].scores  # rows differ, and only the text is shared


def test_a_prompt_that_is_replaced_or_removed_leaves_nothing(package: Path) -> None:
    text = (FIRST + SECOND)[:200]
    with opened(package) as runtime:
        first = runtime.logits(text, prompt="front")
        template = Template.parse("{prompt}{text}\nA:")
        other = make_prompt(runtime.manifest, "front", seed=7, count=5, template=template, verbalizer=WORDS)
        assert runtime._engine.derived._blocks
        runtime.add_prompt(other)
        assert not runtime._engine.derived._blocks
        assert (runtime.logits(text, prompt="front") != first).any()
        runtime.remove_prompt("front")
        assert not runtime._engine.derived._blocks
    with opened(package, prefix_budget=0) as runtime:
        assert runtime.logits(text, prompt="front").tobytes() == first.tobytes()


def test_heads_that_read_every_token_run_every_token(package: Path) -> None:
    """Embeddings read the last token's state alone, heads on every token all of them."""
    with opened(package) as runtime, opened(package, prefix_budget=0) as nothing:
        text = (FIRST + SECOND)[:200]
        expected, asked = nothing.embed([text])[0].tobytes(), runtime.embed([text, text])
        assert asked[0].tobytes() == asked[1].tobytes() == expected
        engine: Any = runtime._engine
        ids, states = runtime._package.tokenizer.encode(text), list[Any]()
        job = engine._job(Request(text), None, ids, ReadState(states), states=states, every_state=True)
        engine.scheduler.submit([job], wait=True)
        job.result()
        assert sum(map(len, states)) == len(ids)


@pytest.mark.parametrize("workers", [None, 3])
def test_threads_under_a_budget_that_evicts_all_the_time(package: Path, workers: int | None) -> None:
    asked = requests(30, seed=5)
    expected = [plain(result) for result in alone(package, asked)]
    with opened(package) as runtime:
        budget = 24 * block_bytes(runtime)
    threads = {"threads": 1} if workers is None else {"threads": None, "workers": workers}
    with opened(package, prefix_budget=budget, max_batch=1, **threads) as runtime:
        failures: list[Any] = []

        def ask(seed: int) -> None:
            order = random.Random(seed).sample(range(len(asked)), len(asked))
            failures.extend(asked[at] for at in order if plain(runtime.run([asked[at]])[0]) != expected[at])

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert not failures
        assert runtime._engine.derived.size <= budget


@pytest.mark.slow
def test_ten_thousand_requests_from_sixteen_threads(package: Path) -> None:
    """Every answer is the one alone, and memory stays flat, while the budget evicts all the time."""
    asked = requests(200, seed=11)
    expected = [plain(result) for result in alone(package, asked)]
    with opened(package) as runtime:
        budget = 48 * block_bytes(runtime)
    with opened(package, prefix_budget=budget, max_batch=1) as runtime:
        failures, sizes = list[Any](), list[int]()

        def ask(seed: int) -> None:
            rng = random.Random(seed)
            for count in range(625):
                at = rng.randrange(len(asked))
                if plain(runtime.run([asked[at]])[0]) != expected[at]:
                    failures.append(asked[at])
                if seed == 0 and count % 25 == 0:
                    sizes.append(split_rss().get("anonymous", 0))

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(16)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert not failures
        assert runtime._engine.derived.size <= budget
        assert max(sizes[5:]) - sizes[5] < 16 << 20


@pytest.mark.slow
def test_attention_with_a_window(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A window that has moved on: blocks are used in place, and never where a graph keeps fewer positions."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from exporters import export_model

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    config = MistralConfig(vocab_size=512, num_key_value_heads=2, sliding_window=8, initializer_range=0.2, **sizes)
    package = export_model(save_tiny(MistralForCausalLM(config)), tmp_path / "mistral", precision="fp32").path
    ids = [int(token) for token in np.random.default_rng(0).integers(3, 500, 100)]
    for path in (package, growing_package(package, tmp_path)):
        found = []
        for budget in (0, 1 << 20):
            with edgeprompt.load(path, options=replace(QUIET, prefix_budget=budget)) as runtime:
                asks = [runtime.logits(input_ids=ids[:count]) for count in (100, 70, 100, 40)]
                found.append([logits.tobytes() for logits in asks])
        assert found[0] == found[1]


def test_a_chat_reads_what_is_new(smollm2_package: Path) -> None:
    options = EngineOptions(provider="cpu", threads=1)
    with edgeprompt.load(smollm2_package, options=options) as runtime:
        messages, timings = [{"role": "user", "content": "Tell me of three old films that a child would like."}], []
        for question in (
            "Which of them is the longest, and why is it so long?",
            "Who made it?",
            "Sum it all up, please.",
        ):
            result = runtime.chat(messages, max_new_tokens=12)
            timings.append(result.timings)
            messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": question}]
        forked = runtime.chat([*messages[:-1], {"role": "user", "content": "Thank you."}], max_new_tokens=2).timings
    assert [timing.reused_tokens // BLOCK > place for place, timing in enumerate(timings[1:])] == [True, True]
    assert timings[2].computed_tokens < timings[2].input_tokens / 2
    assert forked.reused_tokens >= timings[2].input_tokens // BLOCK * BLOCK


def test_texts_are_computed_anew_where_nobody_wants_them_kept(package: Path) -> None:
    with opened(package, reuse_texts=False) as runtime:
        found = [runtime.generate(FIRST, prompt="front", max_new_tokens=1) for _ in range(2)]
        assert found[1].timings.computed_tokens == found[1].timings.input_tokens > BLOCK
        assert not runtime._engine.derived._blocks
        assert len(runtime._engine.derived) > 0  # prompts are kept
