"""Answers over HTTP are the runtime's own, for all architectures and with the clients that people use."""

from __future__ import annotations

import asyncio
import base64
from itertools import chain
from typing import Any

import numpy as np
import openai
import pytest

from edgeprompt import Generation, Request
from edgeprompt.request import GenerationOptions, as_json
from tests.support.server import Running

TEXTS = ["the film was good", "a long story about music", "never again"]


@pytest.fixture(params=["decoder", "seq2seq"])
def generating(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["decoder", "encoder", "seq2seq"])
def any_server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def base_of(server: Running) -> str:
    return server.runtime.manifest.base.name


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def generate(server: Running, text: Any, prompt: str | None, **options: Any) -> Generation:
    asked = Request(text, prompt, task="generate", options=GenerationOptions(**options))
    (found,) = server.runtime.run([asked])
    assert isinstance(found, Generation)
    return found


def test_models_are_the_base_and_the_prompts(any_server: Running) -> None:
    with client_of(any_server) as client:
        listed = [model.id for model in client.models.list()]
        assert listed == [base_of(any_server), *any_server.runtime.prompts]
        for name in listed:
            assert client.models.retrieve(name).id == name


def test_a_model_says_what_it_is_for(encoder: Running) -> None:
    found = encoder.get("/v1/models/deep, short").json()
    assert (found["task"], found["method"], len(found["labels"])) == ("classify", "prefix-tuning", 4)
    assert encoder.get(f"/v1/models/{base_of(encoder)}").json()["architecture"] == "encoder-only"


def test_completions(generating: Running) -> None:
    with client_of(generating) as client:
        for model in (base_of(generating), "story", "words"):
            found = client.completions.create(model=model, prompt=TEXTS, max_tokens=6)
            prompt = None if model == base_of(generating) else model
            expected = [generate(generating, text, prompt, max_new_tokens=6) for text in TEXTS]
            assert [choice.text for choice in found.choices] == [one.text for one in expected]
            assert [choice.index for choice in found.choices] == [0, 1, 2]
            assert found.usage is not None
            assert found.usage.prompt_tokens == sum(one.timings.input_tokens for one in expected)
            assert found.usage.completion_tokens == sum(len(one.token_ids) for one in expected)


def test_choices_have_seeds_of_their_own(generating: Running) -> None:
    with client_of(generating) as client:
        found = client.completions.create(
            model="story", prompt=TEXTS[:2], max_tokens=6, n=3, temperature=1.2, top_p=0.9, seed=5
        )
    expected = [
        generate(generating, text, "story", max_new_tokens=6, temperature=1.2, top_p=0.9, seed=5 + index).text
        for text in TEXTS[:2]
        for index in range(3)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert len(set(expected)) > 2


def test_token_ids_and_own_fields(decoder: Running) -> None:
    ids = decoder.runtime.tokenizer.encode(TEXTS[0])
    found = decoder.post("/v1/completions", {"model": base_of(decoder), "prompt": ids, "max_tokens": 4}).json()
    assert found["choices"][0]["text"] == generate(decoder, TEXTS[0], None, max_new_tokens=4).text
    body = {"model": "story", "prompt": {"text": TEXTS[0]}, "choices": [" yes", " no"]}
    assert decoder.post("/v1/completions", body).json()["choices"][0]["text"] in (" yes", " no")


def test_a_stop_text_ends_the_answer(generating: Running) -> None:
    whole = generate(generating, TEXTS[0], "story", max_new_tokens=12).text
    stop = whole[4:6]
    expected = generate(generating, TEXTS[0], "story", max_new_tokens=12, stop=(stop,))
    with client_of(generating) as client:
        (choice,) = client.completions.create(model="story", prompt=TEXTS[0], max_tokens=12, stop=stop).choices
        pieces = client.completions.create(model="story", prompt=TEXTS[0], max_tokens=12, stop=[stop], stream=True)
        chunks = [chunk.choices[0] for chunk in pieces]
    assert (choice.text, choice.finish_reason) == (expected.text, "stop")
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert [chunk.finish_reason for chunk in chunks[-2:]] == [None, "stop"]


def test_log_probabilities(generating: Running) -> None:
    expected = generate(generating, TEXTS[0], "story", max_new_tokens=8, top_logprobs=3)
    assert len(expected.top_logprobs) == len(expected.logprobs) == 8
    for token, logprob, top in zip(expected.token_ids, expected.logprobs, expected.top_logprobs, strict=True):
        assert top[0] == (token, logprob)  # greedy
        assert [chance for _, chance in top] == sorted((chance for _, chance in top), reverse=True)
    with client_of(generating) as client:
        whole = client.completions.create(model="story", prompt=TEXTS[0], max_tokens=8, logprobs=3).choices[0]
        stream = client.completions.create(model="story", prompt=TEXTS[0], max_tokens=8, logprobs=3, stream=True)
        parts = [chunk.choices[0].logprobs for chunk in stream]
    assert whole.logprobs is not None
    assert whole.logprobs.token_logprobs == list(expected.logprobs)
    assert whole.text.startswith("".join(whole.logprobs.tokens or []))
    assert whole.logprobs.top_logprobs is not None
    assert max(whole.logprobs.top_logprobs[0].values()) == expected.logprobs[0]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [*chain(*(getattr(part, name) for part in parts if part))] == getattr(whole.logprobs, name)


def test_streams_say_what_completions_say(generating: Running) -> None:
    with client_of(generating) as client:
        stream = client.completions.create(
            model="story",
            prompt=TEXTS,
            max_tokens=10,
            temperature=0.7,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, reasons, usage = ["", "", ""], {}, None
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
            usage = chunk.usage
    expected = [generate(generating, text, "story", max_new_tokens=10, temperature=0.7, seed=3) for text in TEXTS]
    assert texts == [one.text for one in expected]
    assert set(reasons) == {0, 1, 2}
    assert usage is not None
    assert usage.completion_tokens == sum(len(one.token_ids) for one in expected)


def test_chat(chatting: Running) -> None:
    messages: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]},
    ]
    plain = [{"role": one["role"], "content": one["content"]} for one in messages[:3]]
    plain.append({"role": "user", "content": "the film"})
    for model in (base_of(chatting), "story"):
        prompt = "story" if model == "story" else None
        expected = chatting.runtime.chat(plain, prompt=prompt, max_new_tokens=8, top_logprobs=2)
        with client_of(chatting) as client:
            found = client.chat.completions.create(
                model=model, messages=messages, max_completion_tokens=8, logprobs=True, top_logprobs=2
            )
            stream = client.chat.completions.create(model=model, messages=messages, max_tokens=8, stream=True)
            deltas = [chunk.choices[0].delta for chunk in stream]
        (choice,) = found.choices
        assert choice.message.content == expected.text
        assert choice.logprobs is not None
        assert [token.logprob for token in choice.logprobs.content or []] == list(expected.logprobs)
        assert [len(token.top_logprobs) for token in choice.logprobs.content or []] == [2] * len(expected.logprobs)
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == expected.text


def test_an_answer_goes_back_into_the_conversation(chatting: Running) -> None:
    """As OpenAI's guides write it: with all fields that the answer's message has."""
    messages: Any = [{"role": "user", "content": "hello"}]
    with client_of(chatting) as client:
        for _ in range(2):
            found = client.chat.completions.create(model="story", messages=messages, max_tokens=4)
            messages += [found.choices[0].message, {"role": "user", "content": "and?"}]
    plain = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": messages[1].content}, messages[2]]
    expected = chatting.runtime.chat(plain, prompt="story", max_new_tokens=4)
    assert messages[3].content == expected.text
    given = {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    plain[1] |= given  # other servers' messages have more
    body = {"model": "story", "messages": plain, "max_tokens": 4}
    choice = chatting.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == expected.text


def test_asyncio_client(chatting: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{chatting.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model="story", messages=[{"role": "user", "content": text}], max_tokens=5
                )
                for text in TEXTS
            ]
            return [found.choices[0].message.content or "" for found in await asyncio.gather(*asked)]

    expected = [
        chatting.runtime.chat([{"role": "user", "content": text}], prompt="story", max_new_tokens=5).text
        for text in TEXTS
    ]
    assert asyncio.run(ask()) == expected


def test_embeddings(any_server: Running) -> None:
    prompt = "two" if "two" in any_server.runtime.prompts else "story"
    for model in (base_of(any_server), prompt):
        expected = any_server.runtime.embed(TEXTS, prompt=None if model == base_of(any_server) else model)
        with client_of(any_server) as client:  # asks for base64
            found = client.embeddings.create(model=model, input=TEXTS)
            plain = client.embeddings.create(model=model, input=TEXTS[0], encoding_format="float", user="me")
        for one, row in zip(found.data, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(one.embedding, np.float32), row)
        np.testing.assert_array_equal(np.asarray(plain.data[0].embedding, np.float32), expected[0])
        raw = any_server.post("/v1/embeddings", {"model": model, "input": TEXTS, "encoding_format": "base64"}).json()
        decoded = np.frombuffer(base64.b64decode(raw["data"][2]["embedding"]), "<f4")
        np.testing.assert_array_equal(decoded, expected[2])
        counted = sum(len(any_server.runtime.tokenizer.encode(text)) for text in TEXTS)
        assert raw["usage"] == {"prompt_tokens": counted, "total_tokens": counted}
        wrong = any_server.post("/v1/embeddings", {"model": model, "input": "a", "dimensions": 3})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "dimensions")


def test_pooling_is_asked_for(encoder: Running) -> None:
    found = encoder.post("/v1/embeddings", {"model": base_of(encoder), "input": TEXTS[0], "pooling": "cls"}).json()
    expected = encoder.runtime.embed(TEXTS[:1], pooling="cls")[0]
    np.testing.assert_array_equal(np.asarray(found["data"][0]["embedding"], np.float32), expected)


def test_labels_with_scores(any_server: Running) -> None:
    for model in [name for name in ("words", "two", "deep, short") if name in any_server.runtime.prompts]:
        expected = any_server.runtime.classify(TEXTS, prompt=model)
        found = any_server.post("/v1/classify", {"model": model, "input": TEXTS}).json()["data"]
        assert [one["index"] for one in found] == [0, 1, 2]
        assert [one["label"] for one in found] == [one.label for one in expected]
        assert [one["scores"] for one in found] == [dict(one.scores) for one in expected]
        assert [one["logits"] for one in found] == [dict(one.logits) for one in expected]
        alone = any_server.post("/v1/classify", {"model": model, "input": {"text": TEXTS[1]}}).json()["data"]
        assert alone == [{**found[1], "index": 0}]


def test_what_an_architecture_cannot_do_is_said(encoder: Running, seq2seq: Running) -> None:
    for path, more in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        for streams in (False, True):
            found = encoder.post(f"/v1/{path}", {"model": "two", "stream": streams, **more})
            assert found.status_code == 400
            assert "do not generate" in found.json()["error"]["message"]
    body = {"model": "story", "messages": [{"role": "user", "content": "a"}]}
    assert "chat templates are for decoder-only" in seq2seq.post("/v1/chat/completions", body).text
    assert "'tag'" in encoder.post("/v1/classify", {"model": "tag", "input": "a"}).json()["error"]["message"]


def test_errors_have_openais_form(decoder: Running) -> None:
    with client_of(decoder) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="nobody", prompt="a")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="story", prompt="a", max_tokens=100_000)
        with pytest.raises(openai.BadRequestError) as unknown:
            client.completions.create(model="story", prompt="a", extra_body={"best_off": 1})
        with pytest.raises(openai.BadRequestError) as chat:
            client.chat.completions.create(model="story", messages=[{"role": "user", "content": "a"}])
    assert missing.value.code == "model_not_found"
    assert "shorten the text" in wrong.value.message
    assert unknown.value.param == "best_off"
    assert "no chat template" in chat.value.message
    assert "/" not in chat.value.message.partition("}")[0].replace("error/", "")
    for path, method, status in (("/v2", "GET", 404), ("/v1/completions", "GET", 405), ("/", "GET", 404)):
        found = decoder.get(path) if method == "GET" else decoder.post(path, {})
        assert found.status_code == status
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_an_error_in_a_stream_is_an_event(decoder: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.runtimes import hold

    begun, go = hold(decoder.runtime, monkeypatch)
    with client_of(decoder) as client:
        stream = client.completions.create(model="story", prompt="a", max_tokens=50, stream=True)
        assert begun.wait(20)
        for job in tuple(decoder.server._service._jobs):
            job.cancel()
        go.set()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)


def test_tags(encoder: Running) -> None:
    expected = encoder.runtime.tag(TEXTS, prompt="tag")
    found = encoder.post("/v1/tag", {"model": "tag", "input": TEXTS}).json()
    assert [one["index"] for one in found["data"]] == [0, 1, 2]
    for one, result in zip(found["data"], expected, strict=True):
        assert one["spans"] == [as_json(span) for span in result.spans]
        assert one["words"] == [as_json(word) for word in result.words]
        assert one["words"]
    assert found["usage"]["prompt_tokens"] > 0
    assert encoder.logged(endpoint="/v1/tag")["status"] == 200
    assert "not for 'tag'" in encoder.post("/v1/tag", {"model": "two", "input": "a"}).json()["error"]["message"]


def test_answers_to_questions(encoder: Running) -> None:
    asked, contexts = ["what was good", "what is long"], TEXTS[:2]
    expected = encoder.runtime.answer(asked, contexts, prompt="qa")
    body = {"model": "qa", "question": asked, "context": contexts}
    found = encoder.post("/v1/answer", body).json()["data"]
    assert found == [
        {"index": i, "answer": one.text, "start": one.start, "end": one.end, "score": one.score}
        for i, one in enumerate(expected)
    ]
    alone = encoder.post("/v1/answer", {**body, "question": asked[1], "context": contexts[1]}).json()["data"]
    assert alone == [{**found[1], "index": 0}]
    for wrong, message in (
        ({**body, "context": contexts[:1]}, "2 questions and 1 contexts"),
        ({**body, "question": asked[0], "context": contexts[:1]}, "give one of each"),
        ({**body, "model": base_of(encoder)}, "finds no answers"),
        ({**body, "model": "two"}, "a question needs two"),
        ({**body, "model": "tag"}, "a question needs two"),
        ({"model": "qa", "question": "a"}, "context is missing"),
    ):
        refused = encoder.post("/v1/answer", wrong)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    assert encoder.post("/v1/answer", {**body, "model": "nothing"}).status_code == 404
