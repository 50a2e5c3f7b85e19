from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions, GenerationOptions, PromptFile, Request, Runtime
from edgeprompt.engines.seq2seq.graphs import SourceRow
from edgeprompt.errors import (
    CapacityError,
    InputError,
    PromptFileError,
    PromptNotFoundError,
    RequestCancelledError,
    RequestTimeoutError,
    TemplateError,
    UnsupportedError,
)
from edgeprompt.package.folder import Package, open_package
from edgeprompt.prompts.file import Head, HeadStep, save_prompt
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_prompt

OPTIONS = EngineOptions(provider="cpu", threads=1, spinning=False)
TEXT = "the film was never boring"
WORDS = {"negative": (" bad", " not so good"), "positive": (" good", " not so bad")}


@pytest.fixture(scope="module")
def t5(seq2seq_package: Callable[..., Path]) -> Iterator[Runtime]:
    with edgeprompt.load(seq2seq_package("T5"), options=OPTIONS) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def bart(seq2seq_package: Callable[..., Path]) -> Iterator[Runtime]:
    with edgeprompt.load(seq2seq_package("BART"), options=OPTIONS) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def loaded(seq2seq_base: Callable[[str], Path]) -> Any:
    from edgeprompt.base.load import load_base

    return load_base(seq2seq_base("T5"))


def reference(loaded: Any, ids: list[int], tokens: list[int], prompt: PromptFile | None = None) -> Any:
    """PyTorch's logits behind each decoder token; `ids` with virtual ones among them."""
    from exporters.validate.seq2seq import Row, reference_logits

    parts = (None, None, None)
    if prompt is not None:
        parts = (prompt.prompt_embeddings, prompt.encoder_past_key_values, prompt.past_key_values)
    return reference_logits(loaded, Row(SourceRow(np.array(ids), parts[0], parts[1]), parts[2], tokens))


def close(found: Any, wanted: Any) -> bool:
    return bool(np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max())


def encode(runtime: Runtime, text: str) -> list[int]:
    return runtime._package.tokenizer.encode(text, add_special_tokens=False)


def test_logits_without_a_prompt_are_the_base(t5: Runtime, loaded: Any) -> None:
    ids = encode(t5, TEXT)
    assert close(t5.logits(TEXT), reference(loaded, ids, [1])[0])
    assert close(t5.logits(input_ids=ids), reference(loaded, ids, [1])[0])


def test_virtual_tokens_inside_the_text(t5: Runtime, loaded: Any) -> None:
    prompt = make_prompt(t5.manifest, "inside", template=Template.parse("{prompt:2}the {text}{prompt} is"), count=5)
    t5.add_prompt(prompt)
    ids = [512, 513, *encode(t5, "the film"), 514, 515, 516, *encode(t5, " is")]
    assert close(t5.logits("film", prompt="inside"), reference(loaded, ids, [1], prompt)[0])
    with pytest.raises(InputError, match="needs text, not ids"):
        t5.logits(prompt="inside", input_ids=[5])


def test_prefixes_in_encoder_and_decoder_as_openprompt_has_them(t5: Runtime, loaded: Any) -> None:
    prompt = make_prompt(t5.manifest, "deep", "prefix-tuning")
    size = t5.manifest.geometry
    shape = (size.num_encoder_layers, 2, size.num_key_value_heads, prompt.num_virtual_tokens, size.head_size)
    deep = np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)
    prompt = dataclasses.replace(prompt, encoder_past_key_values=deep)
    t5.add_prompt(prompt)
    wanted = reference(loaded, encode(t5, TEXT), [1], prompt)[0]
    assert close(t5.logits(TEXT, prompt="deep"), wanted)
    without = dataclasses.replace(prompt, encoder_past_key_values=None)
    assert not close(wanted, reference(loaded, encode(t5, TEXT), [1], without)[0])


@pytest.mark.parametrize("prefix", [" so", [7, 9]])
def test_label_words_are_scored_behind_the_decoder_prefix(t5: Runtime, loaded: Any, prefix: Any) -> None:
    prompt = make_prompt(
        t5.manifest, "cloze", template=Template.parse("{prompt}{text}"), verbalizer=WORDS,
        generation={"decoder_prefix": prefix},
    )  # fmt: skip
    t5.add_prompt(prompt)
    ids = [*range(512, 516), *encode(t5, TEXT)]
    start = [1, *(encode(t5, prefix) if isinstance(prefix, str) else prefix)]
    assert close(t5.logits(TEXT, prompt="cloze"), reference(loaded, ids, start, prompt)[-1])
    found = t5.classify(TEXT, prompt="cloze")
    for label, words in WORDS.items():
        scores = []
        for word in words:
            said = encode(t5, word)
            logits = reference(loaded, ids, [*start, *said[:-1]], prompt)[len(start) - 1 :].astype(np.float64)
            chances = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            scores.append(chances[np.arange(len(said)), said].sum())
        assert found.logits[label] == pytest.approx(np.logaddexp.reduce(scores), abs=1e-4)
    assert sum(found.scores.values()) == pytest.approx(1)


def with_ends(runtime: Runtime, count: int) -> Package:
    """The package with many end tokens, so that random text ends early and at different lengths."""
    package = runtime._package
    tokens = dataclasses.replace(package.manifest.tokens, eos=tuple(range(count)))
    return Package(package.path, dataclasses.replace(package.manifest, tokens=tokens))


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("family", ["T5", "BART"])
def test_beams_are_those_of_transformers(
    request: pytest.FixtureRequest, seq2seq_base: Callable[[str], Path], family: str, early: Any, penalty: float
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    package = with_ends(request.getfixturevalue(family.lower()), 60)
    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_base(family)).eval()
    lengths = set()
    with Runtime(package, OPTIONS) as runtime:
        settings = {"length_penalty": penalty, "early_stopping": early}
        prompt = make_prompt(runtime.manifest, "plain", generation=settings)
        runtime.add_prompt(dataclasses.replace(prompt, prompt_embeddings=None))
        for text in (TEXT, "a", "music and actors, and so on", "very long"):
            ids = encode(runtime, text)
            with torch.no_grad():
                wanted = model.generate(
                    torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), num_beams=4, do_sample=False,
                    max_new_tokens=12, length_penalty=penalty, early_stopping=early, eos_token_id=list(range(60)),
                )[0].tolist()[1:]  # fmt: skip
            found = runtime.generate(text, prompt="plain", num_beams=4, max_new_tokens=12)
            end = next((at for at, token in enumerate(wanted) if token < 60), len(wanted))
            assert list(found.token_ids) == wanted[:end]
            lengths.add(end)
    # Rewarding length makes all of them run to the limit.
    assert len(lengths) > 1 or penalty > 0


def test_beams_of_the_bases_generation_config(bart: Runtime) -> None:
    """What the manifest says of beams is what a prompt's `generation` says, which comes before it."""
    settings = {"length_penalty": -1.0, "early_stopping": True}
    package = with_ends(bart, 60)
    said = Package(package.path, dataclasses.replace(package.manifest, generation=settings))

    def answers(one: Package, generation: dict[str, Any]) -> list[tuple[int, ...]]:
        with Runtime(one, OPTIONS) as runtime:
            prompt = make_prompt(runtime.manifest, "plain", generation=generation)
            runtime.add_prompt(dataclasses.replace(prompt, prompt_embeddings=None))
            texts = (TEXT, "a", "music and actors, and so on", "very long")
            return [runtime.generate(text, prompt="plain", num_beams=4, max_new_tokens=12).token_ids for text in texts]

    plain, set_ = answers(package, {}), answers(package, settings)
    assert answers(said, {}) == set_ != plain
    assert answers(said, {"length_penalty": 1.0, "early_stopping": False}) == plain


def test_sampling_depends_on_the_seed_and_not_on_the_batch(t5: Runtime) -> None:
    options = [GenerationOptions(max_new_tokens=8, temperature=1.5, top_k=50, seed=seed) for seed in (1, 2, 1)]
    first, second, again = t5.run([Request(TEXT, options=one) for one in options])
    assert first.token_ids == again.token_ids != second.token_ids
    assert t5.run([Request(TEXT, options=options[1])])[0].token_ids == second.token_ids


def test_streaming_gives_the_same_text(t5: Runtime) -> None:
    whole = t5.generate(TEXT, max_new_tokens=20)
    assert "".join(t5.stream(TEXT, max_new_tokens=20)) == whole.text
    assert (
        "".join(t5.stream(TEXT, max_new_tokens=6, num_beams=2)) == t5.generate(TEXT, max_new_tokens=6, num_beams=2).text
    )
    stop = whole.text[3:6]
    assert "".join(t5.stream(TEXT, max_new_tokens=20, stop=stop)) == whole.text[: whole.text.find(stop)]


def test_choices_and_logprobs(t5: Runtime) -> None:
    assert t5.generate(TEXT, choices=("good", "not so bad")).text in ("good", "not so bad")
    found = t5.generate(TEXT, max_new_tokens=3, logprobs=True)
    assert len(found.logprobs) == len(found.token_ids)
    assert all(value <= 0 for value in found.logprobs)


def test_embeddings_are_the_encoders_states(t5: Runtime, loaded: Any) -> None:
    import torch

    ids = encode(t5, TEXT)
    with torch.no_grad():
        states = loaded.model.get_encoder()(torch.tensor([ids])).last_hidden_state[0].numpy()
    assert close(t5.embed([TEXT, "a"])[0], states.mean(axis=0))
    assert close(t5.embed([TEXT], pooling="cls")[0], states[0])
    assert close(t5.embed([TEXT], pooling="last")[0], states[-1])
    t5.add_prompt(make_prompt(t5.manifest, "rows"))
    assert not close(t5.embed([TEXT], prompt="rows")[0], states.mean(axis=0))


def test_rows_of_int8_do_not_change_each_other(seq2seq_package: Callable[..., Path]) -> None:
    with edgeprompt.load(seq2seq_package("T5", "int8"), options=OPTIONS) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "p", verbalizer=WORDS))
        texts = [TEXT, "a", "music and actors, and so on"]
        together = runtime.classify(texts, prompt="p")
        assert together == [dataclasses.replace(runtime.classify(text, prompt="p"), timings=found.timings)
                            for text, found in zip(texts, together, strict=True)]  # fmt: skip


def test_prompts_from_files_come_and_go_while_others_run(seq2seq_package: Callable[..., Path], tmp_path: Path) -> None:
    # A budget of nothing: every request reads its prompt's file again.
    options = dataclasses.replace(OPTIONS, prefix_budget=0)
    with edgeprompt.load(seq2seq_package("T5"), options=options) as runtime:
        for index in range(4):
            method = ("prompt-tuning", "prefix-tuning")[index % 2]
            prompt = make_prompt(runtime.manifest, f"p{index}", method, seed=index, count=2 + index)
            save_prompt(prompt, tmp_path / f"{index}.safetensors")
            runtime.add_prompt(tmp_path / f"{index}.safetensors")
        wanted = [runtime.generate(TEXT, prompt=f"p{index}", max_new_tokens=5).token_ids for index in range(4)]
        failures: list[BaseException] = []

        def ask(index: int) -> None:
            try:
                for _ in range(6):
                    found = runtime.generate(TEXT, prompt=f"p{index}", max_new_tokens=5)
                    assert found.token_ids == wanted[index]
            except BaseException as error:
                failures.append(error)

        def churn() -> None:
            try:
                for seed in range(20):
                    runtime.add_prompt(make_prompt(runtime.manifest, "churn", seed=seed))
                    runtime.remove_prompt("churn")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        threads.append(threading.Thread(target=churn))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (Request(TEXT, "absent"), PromptNotFoundError, "absent"),
        (Request(TEXT, task="classify"), InputError, "needs a prompt with a verbalizer; add one"),
        (Request(TEXT, "bare", task="classify"), InputError, "prompt 'bare' has no verbalizer"),
        (Request(TEXT, task="tag"), InputError, "tag"),
        (Request(TEXT, chat=True), UnsupportedError, "chat"),
        (Request(""), InputError, "no token"),
        (Request(input_ids=[]), InputError, "no token"),
        (Request(input_ids=[512]), InputError, "512"),
        (Request(input_ids=[-1]), InputError, "-1"),
        (Request(TEXT, timeout=0.0), RequestTimeoutError, "timeout"),
        (Request(TEXT, options=GenerationOptions(num_beams=0)), InputError, "num_beams is 0"),
        (Request(TEXT, options=GenerationOptions(num_beams=2, temperature=1.0)), InputError, "beam search goes"),
        (Request(TEXT, options=GenerationOptions(num_beams=64, max_new_tokens=10**7)), CapacityError, "kv_budget"),
        (Request("x " * 200), InputError, "holds 96"),
        (Request(TEXT, options=GenerationOptions(max_new_tokens=97)), InputError, "96 positions"),
    ],
)
def test_bad_requests_are_one_clear_line(
    t5: Runtime, bart: Runtime, request_: Request, kind: type[Exception], message: str
) -> None:
    runtime = bart if "96" in message else t5
    runtime.add_prompt(make_prompt(runtime.manifest, "bare"))
    good = Request(TEXT, options=GenerationOptions(max_new_tokens=2))
    with pytest.raises(kind, match=message) as caught:
        runtime.run([good, request_])
    assert "\n" not in str(caught.value)
    found, error = runtime.run([good, request_], return_errors=True)
    assert len(found.token_ids) <= 2
    assert isinstance(error, kind)


def test_a_default_length_shrinks_to_the_decoders_positions_and_truncation_cuts_the_text(bart: Runtime) -> None:
    assert len(bart.generate(TEXT, stop="\0\0").token_ids) <= 64
    bart.add_prompt(make_prompt(bart.manifest, "long", "prefix-tuning", count=90))
    assert len(bart.generate(TEXT, prompt="long").token_ids) <= 6
    assert bart.generate("x " * 200, truncate=True, max_new_tokens=2).timings.input_tokens <= 96


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"task": "tag"}, UnsupportedError, "answers by text"),
        (
            {
                "head": {"out.weight": np.ones((2, 32), np.float32)},
                "head_spec": Head("mean", (HeadStep("linear", "out"),)),
                "task": "classify",
            },
            UnsupportedError,
            "with a head",
        ),
        ({"generation": {"decoder_prefix": [512]}}, PromptFileError, "decoder_prefix"),
        ({"generation": {"decoder_prefix": 3}}, PromptFileError, "decoder_prefix"),
        ({"template": Template.parse("{text}")}, TemplateError, "no {prompt}"),
        ({"encoder_past_key_values": np.ones((2, 2, 4, 4, 8), np.float32)}, UnsupportedError, "encoder deep prompts"),
    ],
)
def test_prompts_that_cannot_run_are_refused(
    bart: Runtime, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    prompt = dataclasses.replace(make_prompt(bart.manifest, "bad"), **changes)
    with pytest.raises(kind, match=message):
        bart.add_prompt(prompt)
    assert "bad" not in bart.prompts


def test_closing_fails_what_runs(seq2seq_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = edgeprompt.load(seq2seq_package("T5"), options=OPTIONS)
    graphs, go = runtime._engine._graphs, threading.Event()
    real = graphs.step
    monkeypatch.setattr(graphs, "step", lambda *given: (go.wait(20), real(*given))[1])
    stream = runtime.stream(TEXT, max_new_tokens=50)
    threading.Timer(0.05, go.set).start()
    runtime.close()
    with pytest.raises(RequestCancelledError):
        list(stream)
    with pytest.raises(InputError, match="closed"):
        runtime.run([Request(TEXT)])


def test_the_memory_budget_makes_batches_smaller_and_not_different(
    seq2seq_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request("x " * size, options=GenerationOptions(max_new_tokens=4)) for size in (3, 30, 9, 20)]
    with edgeprompt.load(seq2seq_package("T5"), options=OPTIONS) as runtime:
        wanted = [found.token_ids for found in runtime.run(requests)]
    with edgeprompt.load(seq2seq_package("T5"), options=dataclasses.replace(OPTIONS, kv_budget=100_000)) as runtime:
        engine, sizes = runtime._engine, []
        real = engine._graphs.step

        def step(state: Any, tokens: Any) -> Any:
            sizes.append(len(tokens))
            assert engine._budget.held <= 100_000
            return real(state, tokens)

        monkeypatch.setattr(engine._graphs, "step", step)
        assert [found.token_ids for found in runtime.run(requests)] == wanted
        assert 1 < max(sizes) < 4
        assert engine._budget.held == 0


def test_the_package_opens_by_itself(seq2seq_package: Callable[..., Path]) -> None:
    package = open_package(seq2seq_package("T5"))
    package.verify()
    assert set(package.manifest.graphs) == {"encoder", "decoder"}
