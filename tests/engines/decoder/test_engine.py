from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Generation, PromptFile, Request, Runtime
from edgeprompt.errors import CapacityError, InputError, PromptNotFoundError, TemplateError, UnsupportedError
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.template import Template
from edgeprompt.request import GenerationOptions
from tests.support.prompts import make_infix, make_prompt
from tests.support.runtimes import QUIET

WORDS = ["the", "a", "film", "was", "good", "bad", "very", "story", "actors", "music", "long", "short", "never", "made"]


@pytest.fixture(scope="module")
def runtime(tiny_llama_package: Path) -> Iterator[Runtime]:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def model(tiny_llama_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama_base).eval()


def reference_logits(model: Any, prompt: PromptFile | None, ids: list[int], spread: list[int] | None = None) -> Any:
    """Next-token logits by PyTorch; `spread` are ids with virtual ones among them."""
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        table = model.get_input_embeddings().weight
        if prompt is not None and prompt.is_infix:
            return infix_logits(model, prompt.past_key_values, spread or [])
        if prompt is not None and prompt.past_key_values is not None:
            cache = DynamicCache(config=model.config)
            for layer, (key, value) in enumerate(prompt.past_key_values):
                cache.update(torch.tensor(key)[None], torch.tensor(value)[None], layer)
            mask = torch.ones(1, prompt.num_virtual_tokens + len(ids), dtype=torch.long)
            return model(torch.tensor([ids]), past_key_values=cache, attention_mask=mask).logits[0, -1].numpy()
        if prompt is not None and prompt.prompt_embeddings is not None:
            table = torch.cat([table, torch.tensor(prompt.prompt_embeddings)])
            first = model.config.vocab_size
            ids = spread or [*range(first, first + prompt.num_virtual_tokens), *ids]
        return model(inputs_embeds=table[torch.tensor(ids)][None]).logits[0, -1].numpy()


def infix_logits(model: Any, past: Any, ids: list[int]) -> Any:
    """Token by token; where a virtual id stands, its keys and values are put into the cache."""
    import torch
    from transformers import DynamicCache

    cache, logits, vocab = DynamicCache(config=model.config), None, model.config.vocab_size
    for place, token in enumerate(ids):
        if token >= vocab:
            for layer, (key, value) in enumerate(past[:, :, :, [token - vocab]]):
                cache.update(torch.tensor(key)[None], torch.tensor(value)[None], layer)
            continue
        logits = model(
            torch.tensor([[token]]), past_key_values=cache, attention_mask=torch.ones(1, place + 1, dtype=torch.long)
        ).logits
    assert logits is not None
    return logits[0, -1].numpy()


def assert_close(found: Any, expected: Any) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("method", [None, "prompt-tuning", "prefix-tuning"])
def test_logits_are_those_of_pytorch(runtime: Runtime, model: Any, method: str | None) -> None:
    prompt = make_prompt(runtime.manifest, "p", method) if method else None
    if prompt is not None:
        runtime.add_prompt(prompt)
    ids = runtime._package.tokenizer.encode("the film was good")
    expected = reference_logits(model, prompt, ids)
    assert_close(runtime.logits("the film was good", prompt="p" if prompt else None), expected)
    assert_close(runtime.logits(prompt="p" if prompt else None, input_ids=ids), expected)


def test_virtual_tokens_inside_the_text(runtime: Runtime, model: Any) -> None:
    template = Template.parse("{prompt:2}the {text}{prompt} is")
    prompt = make_prompt(runtime.manifest, "inside", "prompt-tuning", template=template, count=5)
    runtime.add_prompt(prompt)
    encode, first = runtime._package.tokenizer.encode, runtime.manifest.geometry.vocab_size
    ids = [first, first + 1, *encode("the film"), first + 2, first + 3, first + 4, *encode(" is")]
    assert_close(runtime.logits("film", prompt="inside"), reference_logits(model, prompt, [], spread=ids))
    with pytest.raises(InputError, match="needs text, not ids"):
        runtime.logits(prompt="inside", input_ids=[5, 6])


@pytest.mark.parametrize("template", ["{text}{prompt} is", "{prompt:2}the {text}{prompt} is"])
def test_keys_and_values_inside_the_text(runtime: Runtime, model: Any, template: str) -> None:
    prompt = make_infix(runtime.manifest, "infix", template, count=5)
    runtime.add_prompt(prompt)
    encode, first = runtime._package.tokenizer.encode, runtime.manifest.geometry.vocab_size
    lead = 2 if template.startswith("{prompt") else 0
    text = encode("the film was long" if lead else "film was long")
    ids = [*range(first, first + lead), *text, *range(first + lead, first + 5), *encode(" is")]
    expected = reference_logits(model, prompt, [], spread=ids)
    assert_close(runtime.logits("film was long", prompt="infix"), expected)
    found = runtime.generate("film was long", prompt="infix", max_new_tokens=4).token_ids
    for token in found:
        assert int(expected.argmax()) == token
        ids.append(token)
        expected = reference_logits(model, prompt, [], spread=ids)
    with pytest.raises(InputError, match="needs text, not ids"):
        runtime.logits(prompt="infix", input_ids=[5, 6])


def test_keys_and_values_inside_a_long_text(runtime: Runtime, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_infix(runtime.manifest, "infix", "{text}{prompt} is", count=13)
    runtime.add_prompt(prompt)
    monkeypatch.setattr(runtime._engine._lanes[0].graph, "chunk", 8)
    text, first = "the film was long and the story was good and never very short", runtime.manifest.geometry.vocab_size
    encode = runtime._package.tokenizer.encode
    ids = [*encode(text), *range(first, first + 13), *encode(" is")]
    assert_close(runtime.logits(text, prompt="infix"), reference_logits(model, prompt, [], spread=ids))


def test_empty_text_reads_the_last_virtual_token(runtime: Runtime, model: Any) -> None:
    prompt = make_prompt(runtime.manifest, "e", "prompt-tuning", template=Template.parse("{prompt}{text}"))
    runtime.add_prompt(prompt)
    assert_close(runtime.logits("", prompt="e"), reference_logits(model, prompt, []))
    with pytest.raises(InputError, match="no token"):
        runtime.logits("")


def test_long_text_is_prefilled_in_chunks(runtime: Runtime, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_prompt(runtime.manifest, "long", "prompt-tuning")
    runtime.add_prompt(prompt)
    ids = [int(x) for x in np.random.default_rng(0).integers(3, 500, 150)]
    monkeypatch.setattr(runtime._engine._lanes[0].graph, "chunk", 16)
    assert_close(runtime.logits(prompt="long", input_ids=ids), reference_logits(model, prompt, ids))


@pytest.mark.parametrize("method", [None, "prompt-tuning", "prefix-tuning"])
def test_greedy_tokens_are_those_of_pytorch(runtime: Runtime, model: Any, method: str | None) -> None:
    prompt = make_prompt(runtime.manifest, "g", method) if method else None
    if prompt is not None:
        runtime.add_prompt(prompt)
    ids = runtime._package.tokenizer.encode("it was a very long film")
    found = runtime.generate(prompt="g" if prompt else None, input_ids=ids, max_new_tokens=12, logprobs=True)
    tokens: list[int] = []
    for logprob in found.logprobs:
        expected = reference_logits(model, prompt, [*ids, *tokens]).astype(np.float64)
        tokens.append(int(expected.argmax()))
        assert logprob == pytest.approx(expected.max() - np.log(np.exp(expected).sum()), abs=1e-3)
    assert found.token_ids == tuple(tokens)


def test_label_words_of_several_tokens_are_scored_whole(runtime: Runtime, model: Any) -> None:
    words = {"x": (" good", " good story", " very good actors"), "y": (" bad", " never ever made")}
    prompt = make_prompt(runtime.manifest, "v", "prompt-tuning", verbalizer=words, calibration=(0.5, -0.5))
    runtime.add_prompt(prompt)
    encode = runtime._package.tokenizer.encode
    text = encode("the film\nA:")
    scores = {}
    for label, texts in words.items():
        logprobs = []
        for word in texts:
            ids, total = encode(word), 0.0
            for at, token in enumerate(ids):
                row = reference_logits(model, prompt, [*text, *ids[:at]]).astype(np.float64)
                total += row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()
            logprobs.append(total)
        scores[label] = np.logaddexp.reduce(logprobs)
    found = runtime.classify("the film", prompt="v")
    assert dict(found.logits) == pytest.approx(scores, abs=1e-3)
    difference = (scores["x"] - 0.5) - (scores["y"] + 0.5)
    assert found.scores["x"] == pytest.approx(1 / (1 + np.exp(-difference)), abs=1e-3)
    assert found.label == ("x" if difference > 0 else "y")


def test_room_for_label_words_is_checked_before_work(runtime: Runtime) -> None:
    words = {"x": (" very good actors",), "y": (" bad",)}
    prompt = make_prompt(runtime.manifest, "w", "prefix-tuning", verbalizer=words)
    runtime.add_prompt(prompt)
    deepest = max(len(runtime._package.tokenizer.encode(word)) for label in words.values() for word in label)
    room = 256 - prompt.num_virtual_tokens - deepest
    assert runtime.classify(input_ids=[5] * room, prompt="w").label in words
    with pytest.raises(InputError, match=f"{room + 1} text and {deepest} new tokens; the base holds 256"):
        runtime.classify(input_ids=[5] * (room + 1), prompt="w")


def random_request(rng: random.Random, prompts: list[str]) -> Request:
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))
    if rng.random() < 0.4:
        return Request(text, rng.choice(prompts), task="classify")
    options = GenerationOptions(
        max_new_tokens=rng.randint(1, 20), temperature=rng.choice([0, 0.8]), seed=rng.randint(0, 9)
    )
    return Request(text, rng.choice([None, *prompts]), task="generate", options=options)


def answer_of(result: Any) -> Any:
    if isinstance(result, Generation):
        return result.token_ids, result.text, result.finish_reason
    return result.label, dict(result.logits)


def test_mixed_requests_from_many_threads_equal_each_alone(tiny_llama_package: Path) -> None:
    rng = random.Random(0)
    with edgeprompt.load(tiny_llama_package, options=replace(QUIET, prefix_budget=60_000)) as runtime:
        names = []
        for index in range(20):
            method = "prefix-tuning" if index % 4 == 3 else "prompt-tuning"
            template = (
                "a {prompt:3}{text}{prompt}" if index % 5 == 4 and method == "prompt-tuning" else "{prompt}{text}\nA:"
            )
            words = {"x": (" good", " very good"), "y": (" bad",)}
            prompt = make_prompt(
                runtime.manifest, f"p{index}", method, seed=index, count=4 + index % 7,
                template=Template.parse(template), verbalizer=words,
            )  # fmt: skip
            names.append(runtime.add_prompt(prompt))
        requests = [random_request(rng, names) for _ in range(200)]
        alone = [answer_of(runtime.run([request])[0]) for request in requests]
        assert runtime._engine.derived.misses > 20  # the budget holds few of the prompts: prefixes were rebuilt
        found: list[Any] = [None] * len(requests)
        order = list(range(len(requests)))
        rng.shuffle(order)

        def client(number: int) -> None:
            for index in order[number::16]:
                time.sleep(random.random() * 0.01)
                found[index] = answer_of(runtime.run([requests[index]])[0])

        threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = [answer_of(result) for result in runtime.run(requests)]
    for index, expected in enumerate(alone):
        for result in (found[index], together[index]):
            if isinstance(expected[1], dict):
                assert result[0] == expected[0]
                assert result[1] == pytest.approx(expected[1], abs=1e-4)
            else:
                assert result == expected, requests[index]


def test_prefix_rebuilt_after_eviction_is_the_same(tiny_llama_package: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=replace(QUIET, prefix_budget=0)) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "p", "prompt-tuning"))
        before = runtime.logits("a film", prompt="p")
        runtime.generate("another text that uses the slot")
        assert (runtime.logits("a film", prompt="p") == before).all()


def test_replaced_and_removed_prompts(runtime: Runtime) -> None:
    one, two = (make_prompt(runtime.manifest, "r", "prompt-tuning", seed=seed) for seed in (1, 2))
    runtime.add_prompt(one)
    first = runtime.logits("film", prompt="r")
    runtime.add_prompt(two)
    assert np.abs(runtime.logits("film", prompt="r") - first).max() > 1e-3
    runtime.add_prompt(one)
    assert (runtime.logits("film", prompt="r") == first).all()
    runtime.remove_prompt("r")
    for call in (lambda: runtime.logits("film", prompt="r"), lambda: runtime.remove_prompt("r")):
        with pytest.raises(PromptNotFoundError, match="no prompt 'r'"):
            call()


def test_limits_are_checked_before_work(runtime: Runtime, tiny_llama_package: Path) -> None:
    runtime.add_prompt(make_prompt(runtime.manifest, "l", "prompt-tuning", verbalizer={"x": (" a",), "y": (" b",)}))
    long = "good " * 400
    with pytest.raises(InputError, match=r"needs 4 prompt, \d+ text and 1 new tokens; the base holds 256"):
        runtime.classify(long, prompt="l")
    assert runtime.classify(long, prompt="l", truncate=True).label in ("x", "y")
    cut = runtime.generate(long, prompt="l", truncate=True, max_new_tokens=20)
    assert cut.timings.input_tokens + 4 + 20 == 256
    assert runtime.generate(input_ids=[5] * 250).timings.new_tokens <= 6  # a default length shrinks
    with pytest.raises(InputError, match="lower max_new_tokens"):
        runtime.generate(input_ids=[5] * 250, max_new_tokens=7)
    for ids in ([512], [-1]):
        with pytest.raises(InputError, match="ids of this base are 0 to 511"):
            runtime.generate(input_ids=ids)
    small = edgeprompt.load(tiny_llama_package, options=replace(QUIET, kv_budget=1000))
    with small, pytest.raises(CapacityError, match="kv_budget"):
        small.generate("a", max_new_tokens=4)


@pytest.mark.parametrize("text", ["\0", "😀👩‍👩‍👧", "é\u0301", " ", "\n\n", "<eos>", "ａ" * 50])
def test_odd_texts_have_answers(runtime: Runtime, text: str) -> None:
    assert runtime.generate(text, max_new_tokens=2).timings.new_tokens <= 2


def test_a_hundred_thousand_characters(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="the base holds 256"):
        runtime.generate("x" * 100_000)
    assert runtime.generate("x" * 100_000, truncate=True, max_new_tokens=1).timings.input_tokens == 255


def test_what_does_not_fit_a_decoder(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="task 'tag'"):
        runtime.run([Request("a", task="tag")])
    with pytest.raises(InputError, match="needs a prompt with a verbalizer"):
        runtime.classify("a")
    runtime.add_prompt(make_prompt(runtime.manifest, "bare", "prompt-tuning"))
    with pytest.raises(InputError, match="'bare' has no verbalizer"):
        runtime.classify("a", prompt="bare")
    with pytest.raises(TemplateError, match=r"no \{prompt\}"):
        runtime.add_prompt(make_prompt(runtime.manifest, "t", "prompt-tuning", template=Template.parse("{text}")))


def head_prompt(manifest: Any, name: str, source: str = "last", **fields: Any) -> PromptFile:
    weight = np.random.default_rng(5).normal(0, 0.3, (3, 64)).astype(np.float32)
    spec = Head(source, (HeadStep("linear", "score"),))
    made = make_prompt(manifest, name, task="classify", head={"score.weight": weight}, head_spec=spec, **fields)
    return replace(made, labels=("x", "y", "z"))


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_head_reads_the_last_token(method: str, runtime: Runtime, model: Any) -> None:
    import torch

    prompt = head_prompt(runtime.manifest, f"head of {method}", method=method)
    name = runtime.add_prompt(prompt)
    ids = [11, 40, 7]
    states = []
    keep = model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1]))
    reference_logits(model, prompt, ids)
    keep.remove()
    want = (torch.tensor(prompt.head["score.weight"]) @ states[0]).detach().numpy()
    requests = [Request(input_ids=ids, prompt=name), Request("a film"), Request(input_ids=ids, prompt=name)]
    first, text, second = runtime.run(requests)
    assert_close(np.array(list(first.logits.values())), want)
    assert (first.label, first.logits) == (second.label, second.logits)
    assert first.label == "xyz"[int(want.argmax())]
    assert isinstance(text, Generation)
    assert_close(runtime.embed([""], input_ids=[ids], prompt=name)[0], states[0].detach().numpy())


def test_heads_that_do_not_fit_a_decoder(runtime: Runtime) -> None:
    with pytest.raises(UnsupportedError, match="reads 'mean'"):
        runtime.add_prompt(head_prompt(runtime.manifest, "h", "mean"))
    with pytest.raises(InputError, match="3 scores for 2 labels"):
        runtime.add_prompt(replace(head_prompt(runtime.manifest, "h"), labels=("x", "y")))
    with pytest.raises(InputError, match="pooling 'mean' needs an encoder"):
        runtime.embed(["a"], pooling="mean")
