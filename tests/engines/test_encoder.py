"""The encoder engine: mixed batches, heads, tags, answers, embeddings, cloze; on MiniLM and on small random models."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import Classification, EngineOptions, PromptFile, Request, Span
from edgeprompt.encoder_text import encode_text, first_tokens, words_of
from edgeprompt.engines.encoder_batch import split_batches
from edgeprompt.engines.encoder_tasks import answer, join_words
from edgeprompt.errors import (
    BaseMismatchError,
    EdgePromptError,
    InputError,
    RequestTimeoutError,
    TemplateError,
    UnsupportedError,
)
from edgeprompt.heads import apply_head
from edgeprompt.prompt_file import Head, HeadStep
from edgeprompt.template import Template
from tests.prompts import make_prompt

OPTIONS = EngineOptions(provider="cpu", threads=1, spinning=False)
LINEAR = (HeadStep("linear", "classifier"),)


def with_head(
    runtime: edgeprompt.Runtime, name: str, outputs: int, source: str = "first_text", **fields: Any
) -> PromptFile:
    """A random prompt with a random linear head."""
    rng = np.random.default_rng(outputs)
    size = runtime.manifest.geometry.hidden_size
    problem = fields.pop("problem_type", "single_label")
    fields.setdefault("task", "classify")
    fields.setdefault("labels", tuple(f"label {index}" for index in range(outputs)))
    fields.setdefault("template", Template.parse("{prompt}{text}"))
    return make_prompt(
        runtime.manifest,
        name,
        fields.pop("method", "prompt-tuning"),
        head={"classifier.weight": rng.normal(0, 0.1, (outputs, size)).astype(np.float32)},
        head_spec=Head(source, LINEAR, problem),
        **fields,
    )


def add_all(runtime: edgeprompt.Runtime) -> None:
    """Prompts of several tasks, methods, lengths and label counts."""
    question = Template.parse("{prompt}{question}{context}")
    tags = ("O", "B-x", "I-x")
    for prompt in (
        with_head(runtime, "two", 2, "pooler", count=3),
        with_head(runtime, "five", 5, "mean", count=9, seed=1),
        with_head(runtime, "deep", 3, "first_text", method="p-tuning-v2", count=6),
        with_head(runtime, "deep, short", 4, "last", method="prefix-tuning", count=1),
        with_head(runtime, "tag", 3, "tokens", task="tag", labels=tags, count=4),
        with_head(runtime, "qa", 2, "tokens", task="qa", labels=(), count=2, template=question),
    ):
        runtime.add_prompt(prompt)


def mixed_requests(texts: list[str]) -> list[Request]:
    names = ["two", "five", "deep", "deep, short", "tag", "qa", None]
    found = []
    for index, text in enumerate(texts):
        name = names[index % len(names)]
        found.append(Request({"question": "What is it about?", "context": text} if name == "qa" else text, name))
    return found


@pytest.fixture(scope="module")
def minilm(minilm_package: Path) -> Iterator[edgeprompt.Runtime]:
    with edgeprompt.load(minilm_package, options=OPTIONS) as runtime:
        add_all(runtime)
        yield runtime


@pytest.fixture(scope="module")
def cloze(encoder_package: Callable[..., Path]) -> Iterator[edgeprompt.Runtime]:
    with edgeprompt.load(encoder_package("BERT"), options=OPTIONS) as runtime:
        yield runtime


@pytest.fixture
def texts(snippets: list[tuple[str, str]]) -> list[str]:
    return [text for text, _ in snippets[:42]]


def bare(result: Any) -> Any:
    """A result without its times."""
    return dataclasses.replace(result, timings=None) if isinstance(result, Classification) else result


def test_embeddings_are_those_of_transformers(
    minilm: edgeprompt.Runtime, minilm_folder: Path, texts: list[str]
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm_folder), AutoModel.from_pretrained(minilm_folder).eval()
    for text, got in zip(texts[:5], minilm.embed(texts[:5]), strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        np.testing.assert_allclose(got, states.mean(0), atol=2e-5)
        np.testing.assert_allclose(minilm.embed([text], pooling="cls")[0], states[0], atol=2e-5)
        np.testing.assert_allclose(minilm.embed([text], pooling="last")[0], states[-1], atol=2e-5)


def test_every_row_of_a_mixed_batch_equals_the_row_alone(minilm: edgeprompt.Runtime, texts: list[str]) -> None:
    requests = mixed_requests(texts)
    for request, got in zip(requests, minilm.run(requests), strict=True):
        want = minilm.run([request])[0]
        if isinstance(want, np.ndarray):
            np.testing.assert_allclose(got, want, atol=1e-5)
        elif isinstance(want, Classification):
            assert got.label == want.label
            np.testing.assert_allclose(list(got.logits.values()), list(want.logits.values()), atol=1e-4)
        elif hasattr(want, "words"):
            assert [(span.label, span.text) for span in got.words] == [(span.label, span.text) for span in want.words]
        else:
            assert got.text == want.text


def test_int8_rows_do_not_depend_on_what_their_neighbours_hold(minilm_int8_package: Path, texts: list[str]) -> None:
    """Activations are quantised row by row: an outlier in another row changes nothing, not even the last bit."""
    with edgeprompt.load(minilm_int8_package, options=OPTIONS) as runtime:
        add_all(runtime)
        calm = with_head(runtime, "calm", 2, count=4)
        assert calm.prompt_embeddings is not None
        runtime.add_prompt(calm)
        runtime.add_prompt(dataclasses.replace(calm, name="loud", prompt_embeddings=calm.prompt_embeddings * 100))
        for text in texts[:6]:
            alone, *beside = (
                runtime.run([Request(text, "five"), Request(text, name)])[0] for name in ("five", "calm", "loud")
            )
            assert bare(beside[0]) == bare(beside[1])
            assert beside[0].scores == pytest.approx(alone.scores, abs=0.02)


def test_int8_stays_close_and_small(
    minilm: edgeprompt.Runtime, minilm_package: Path, minilm_int8_package: Path, texts: list[str]
) -> None:
    exact = minilm.embed(texts)
    with edgeprompt.load(minilm_int8_package, options=OPTIONS) as runtime:
        close = runtime.embed(texts)
    cosines = (exact * close).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(close, axis=1)
    assert cosines.min() > 0.985
    sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in (minilm_package, minilm_int8_package)]
    assert sizes[1] < 0.35 * sizes[0]


def test_multi_label_and_regression(minilm: edgeprompt.Runtime) -> None:
    minilm.add_prompt(with_head(minilm, "many", 4, problem_type="multi_label"))
    found = minilm.classify("a fine film", prompt="many")
    chances = {label: 1 / (1 + np.exp(-logit)) for label, logit in found.logits.items()}
    assert found.scores == pytest.approx(chances, abs=1e-6)
    assert set(found.labels) == {label for label, chance in chances.items() if chance > 0.5}
    minilm.add_prompt(with_head(minilm, "rating", 1, problem_type="regression", labels=("rating",)))
    found = minilm.classify("a fine film", prompt="rating")
    assert (found.scores, list(found.logits)) == ({}, ["rating"])
    assert float(found.label) == pytest.approx(found.logits["rating"], abs=1e-6)


def test_given_ids_answer_as_their_text_does(minilm: edgeprompt.Runtime) -> None:
    ids = minilm._package.tokenizer.encode("a fine film")
    for name in ("two", "deep"):
        by_ids = minilm.classify(input_ids=ids, prompt=name)
        assert by_ids.logits == pytest.approx(minilm.classify("a fine film", prompt=name).logits, abs=1e-5)


def test_pairs_are_joined_as_transformers_joins_them(minilm: edgeprompt.Runtime, minilm_folder: Path) -> None:
    from transformers import AutoTokenizer

    want = AutoTokenizer.from_pretrained(minilm_folder)("Who?", "It was I.")
    fields = {"question": "Who?", "context": "It was I."}
    vocab = minilm.manifest.geometry.vocab_size
    found = encode_text(
        Template.parse("{prompt}{question}{context}"),
        minilm._package.tokenizer,
        fields,
        num_virtual_tokens=2,
        first_virtual_id=vocab,
        locate="context",
    )
    assert found.ids == [vocab, vocab + 1, *want["input_ids"]]
    assert found.type_ids == [0, 0, *want["token_type_ids"]]
    pieces = [fields["context"][span[0] : span[1]] for span in found.offsets if span]
    assert pieces == ["It", "was", "I", "."]


def test_offsets_stay_inside_the_slot(minilm: edgeprompt.Runtime) -> None:
    found = encode_text(
        Template.parse("{prompt}Tag this: {text} end"),
        minilm._package.tokenizer,
        {"text": "Ada Lovelace wrote"},
        num_virtual_tokens=1,
        first_virtual_id=40000,
        locate="text",
    )
    pieces = ["Ada Lovelace wrote"[span[0] : span[1]] for span in found.offsets if span]
    assert "".join(pieces) == "AdaLovelacewrote"
    words = words_of("Ada Lovelace wrote")
    starts = [found.offsets[token][0] for token in first_tokens(words, found.offsets) if token is not None]  # type: ignore[index]
    assert starts == [0, 4, 13]


def test_tagging_labels_words_and_joins_them(minilm: edgeprompt.Runtime) -> None:
    text = "The quick, brown fox jumps"
    found = minilm.run([Request(text, "tag")])[0]
    assert [word.text for word in found.words] == text.split()
    assert all(text[span.start : span.end] == span.text for span in (*found.words, *found.spans))


def test_words_join_by_bio() -> None:
    text = "Ada Lovelace met Bob Smith Ann in Rome"
    labels = ["B-P", "I-P", "O", "I-P", "I-P", "B-P", "O", "city"]
    words = [Span(label, *place, text[slice(*place)], 0.5) for label, place in zip(labels, words_of(text), strict=True)]
    assert [(span.label, span.text) for span in join_words(words, text)] == [
        ("P", "Ada Lovelace"), ("P", "Bob Smith"), ("P", "Ann"), ("city", "Rome"),
    ]  # fmt: skip


def test_the_best_span_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    context = "abcdefghijklmnopqrstuvwxyz" * 2
    offsets = [None] * 4 + [(place, place + 1) for place in range(50)] + [None]
    for _ in range(20):
        logits = rng.normal(0, 1, (len(offsets), 2)).astype(np.float32)
        pairs = [(i, j) for i in range(4, 54) for j in range(i, min(i + 30, 54))]
        first, last = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
        found = answer(logits, offsets, context)
        assert (found.start, found.end) == (first - 4, last - 3)
        assert found.text == context[found.start : found.end]
    logits[0] = 50
    assert answer(logits, offsets, context, no_answer_at=0).text == ""


def test_an_answer_leaves_out_the_space_in_front_of_its_first_word() -> None:
    context = "It was I."
    offsets = [None, (0, 2), (2, 6), (6, 8), (8, 9)]  # as byte-level tokens have them
    logits = np.zeros((5, 2), np.float32)
    logits[3] = 5
    found = answer(logits, offsets, context)
    assert (found.text, found.start, found.end) == ("I", 7, 8)


def test_unshifted_heads_answer_for_the_token_that_peft_means(minilm: edgeprompt.Runtime) -> None:
    shifted = with_head(
        minilm, "q1", 2, "tokens", task="qa", labels=(), template=Template.parse("{prompt}{question}{context}")
    )
    unshifted = dataclasses.replace(shifted, name="q2", head_spec=Head("tokens_unshifted", LINEAR))
    engine: Any = minilm._engine
    fields = {"question": "Who?", "context": "It was I and nobody else."}
    logits = []
    from edgeprompt.engines.encoder_tasks import token_logits

    for prompt in (shifted, unshifted):
        minilm.add_prompt(prompt)
        work = engine._encode(Request(fields, prompt.name))
        _, outputs = engine._forward([work])
        logits.append(token_logits(prompt, outputs["last_hidden_state"][0], work.num_virtual_tokens))
    count = shifted.num_virtual_tokens
    np.testing.assert_array_equal(logits[1][count:], logits[0][:-count])


def test_cloze_scores_are_those_of_the_masked_language_model(
    cloze: edgeprompt.Runtime, encoder_base: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    tokenizer = cloze._package.tokenizer
    single = [word for word in (" the", " a", " of", " and", " it", " is") if len(tokenizer.encode(word)) == 1]
    words = {"bad": (single[0],), "good": (single[1], single[2])}
    template = Template.parse("{prompt}{text} It was{mask}.")
    prompt = make_prompt(cloze.manifest, "cloze", task="classify", verbalizer=words, template=template)
    cloze.add_prompt(prompt)
    found = cloze.classify("a story", prompt="cloze")
    model = AutoModelForMaskedLM.from_pretrained(encoder_base("BERT")).eval()
    ids = torch.tensor([tokenizer.encode("a story It was<mask>.")])
    rows = torch.from_numpy(np.asarray(prompt.prompt_embeddings))[None]
    with torch.no_grad():
        embedded = torch.cat([rows, model.get_input_embeddings()(ids)], 1)
        at = rows.shape[1] + ids[0].tolist().index(tokenizer.token_to_id("<mask>"))
        logits = model(inputs_embeds=embedded).logits[0, at]
    np.testing.assert_allclose(cloze.logits("a story", prompt="cloze"), logits.numpy(), atol=1e-3)
    chances = logits.log_softmax(-1)
    for label, options in words.items():
        want = torch.logsumexp(torch.stack([chances[tokenizer.encode(word)[0]] for word in options]), 0)
        assert found.logits[label] == pytest.approx(float(want), abs=1e-3)


def test_a_batch_of_cloze_and_heads(cloze: edgeprompt.Runtime) -> None:
    words = {"x": ("a",), "y": ("e",)}
    template = Template.parse("{text} It was{mask}.")
    cloze.add_prompt(
        make_prompt(cloze.manifest, "words", "p-tuning-v2", task="classify", verbalizer=words, template=template)
    )
    add_all(cloze)
    requests = [
        Request("a story", "words"),
        *mixed_requests(["the film", "a"] * 4),
        Request("longer than the first", "words"),
    ]
    for request, got in zip(requests, cloze.run(requests), strict=True):
        want = cloze.run([request])[0]
        if isinstance(want, Classification):
            assert got.logits == pytest.approx(want.logits, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"template": Template.parse("{text}")}, TemplateError, "no {prompt}"),
        ({"task": "generate"}, UnsupportedError, "do not generate"),
        ({"task": "tag"}, InputError, "its head reads 'first_text'"),
        ({"labels": ("one",)}, InputError, "gives 2 scores for 1 labels"),
        ({"head_spec": None, "head": {}}, InputError, "neither a head nor a verbalizer"),
        (
            {"head_spec": None, "head": {}, "verbalizer": {"a": ("b",), "c": ("d",)}},
            UnsupportedError,
            "no masked language model",
        ),
        (
            {"head": {"classifier.weight": np.ones((2, 7), np.float32)}},
            BaseMismatchError,
            "does not fit hidden size 384",
        ),
    ],
)
def test_prompts_that_cannot_work_are_refused(
    minilm: edgeprompt.Runtime, change: dict[str, Any], kind: type[EdgePromptError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        minilm.add_prompt(dataclasses.replace(with_head(minilm, "bad", 2), **change))
    assert message in str(caught.value)


def test_label_words_must_fit_the_mask(cloze: edgeprompt.Runtime) -> None:
    long = {"a": (" unbelievable words",), "b": ("e",)}
    with pytest.raises(TemplateError, match="tokens; a mask stands for one"):
        cloze.add_prompt(
            make_prompt(cloze.manifest, "w", verbalizer=long, template=Template.parse("{prompt}{text}{mask}"))
        )
    with pytest.raises(TemplateError, match="in the template, found 0"):
        cloze.add_prompt(make_prompt(cloze.manifest, "w", verbalizer=long))


def test_heads_on_a_pooler_that_nobody_trained_are_refused(encoder_package: Callable[..., Path]) -> None:
    with (
        edgeprompt.load(encoder_package("RoBERTa"), options=OPTIONS) as runtime,
        pytest.raises(BaseMismatchError, match="no trained pooler"),
    ):
        runtime.add_prompt(with_head(runtime, "pooled", 2, "pooler"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", "two", task="tag"), "is for 'classify', not for 'tag'"),
        (Request("a", None, task="classify"), "needs a prompt"),
        (Request("a", None, task="generate"), "do not generate"),
        (Request("", "tag", input_ids=[5]), "needs the text"),
        (Request("", "two", input_ids=[30522]), "ids of this base are 0 to 30521"),
        (Request("word " * 600, "two"), "at most 512 fit"),
        (Request({"question": "a"}, "qa"), "needs 'context'"),
        (Request("a", "two", timeout=0.0), "not answered within 0.0 s"),
    ],
)
def test_requests_that_cannot_work_fail_alone(minilm: edgeprompt.Runtime, request_: Request, message: str) -> None:
    found = minilm.run([Request("fine", "two"), request_], return_errors=True)
    assert isinstance(found[0], Classification)
    assert message in str(found[1])
    kinds = (InputError, UnsupportedError, RequestTimeoutError)
    assert isinstance(found[1], kinds)
    with pytest.raises(kinds):
        minilm.run([request_])


def test_long_and_odd_texts(minilm: edgeprompt.Runtime) -> None:
    for text in ("", "   ", "\x00", "🙂" * 3, "a" * 5000):
        assert isinstance(minilm.classify(text, prompt="two"), Classification)
    assert isinstance(minilm.run([Request("word " * 20_000, "deep", truncate=True)])[0], Classification)
    cut = minilm.run([Request("word " * 600, "tag", truncate=True)])[0]
    assert 400 < len(cut.words) < 512


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = [5, 90, 6, 91, 5, 4, 88, 300]
    batches = split_batches(lengths, [0] * len(lengths), max_tokens=300)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 300
        assert sum(lengths[index] for index in batch) >= 0.9 * len(batch) * longest


def test_prompts_come_and_go_while_threads_run(minilm: edgeprompt.Runtime, texts: list[str]) -> None:
    want = minilm.classify(texts[0], prompt="two").logits
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                assert minilm.classify(texts[0], prompt="two").logits == pytest.approx(want, abs=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for index in range(30):
        minilm.add_prompt(with_head(minilm, f"guest {index}", 2, seed=index))
        minilm.classify(texts[1], prompt=f"guest {index}")
        minilm.remove_prompt(f"guest {index}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_heads_in_numpy_are_those_of_torch() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.SiLU(), nn.ReLU()
    )
    module[2].weight.data.normal_()
    names = [
        ("linear", "0"),
        ("gelu", ""),
        ("layer_norm", "2"),
        ("linear", "3"),
        ("tanh", ""),
        ("silu", ""),
        ("relu", ""),
    ]
    states = torch.randn(5, 6) * 3
    tensors = {name: value.numpy() for name, value in module.state_dict().items()}
    got = apply_head(Head("first", tuple(HeadStep(*name) for name in names)), tensors, states.numpy())
    np.testing.assert_allclose(got, module(states).detach().numpy(), atol=1e-5)
