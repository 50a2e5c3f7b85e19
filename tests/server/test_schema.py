"""Bodies are checked by the schemas that the document shows."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprompt.server import bodies
from edgeprompt.server.failures import Failure
from edgeprompt.server.options import ServerOptions
from edgeprompt.server.questions import read_body
from edgeprompt.server.schema import SchemaError, check

LIMITS = ServerOptions(max_text=20, max_inputs=3)
COMPLETION = {"model": "m", "prompt": "a text"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a text"}]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prompt": ["one", "two"]},
        {"prompt": [1, 2, 3]},
        {"prompt": [[1], [2, 3]]},
        {"prompt": {"question": "a", "context": "b"}},
        {"max_tokens": 5, "temperature": 0.5, "top_p": 1, "seed": -1, "n": 2, "stop": "."},
        {"max_tokens": None, "stop": None, "logit_bias": {}, "presence_penalty": 0, "echo": False, "suffix": None},
        {"stop": [], "logprobs": 0, "stream": True, "stream_options": {"include_usage": True}},
        {"max_tokens": 5.0},
    ],
)
def test_what_clients_send_fits(more: dict[str, Any]) -> None:
    check(bodies.completions(LIMITS), {**COMPLETION, **more})


@pytest.mark.parametrize(
    ("more", "where", "message"),
    [
        ({"model": 3}, "model", "must be a text, found an integer"),
        ({"model": ""}, "model", "has 0 characters; at least 1"),
        ({"prompt": None}, "prompt", "a text, token ids"),
        ({"prompt": []}, "prompt", "has 0 items"),
        ({"prompt": ["a", 1]}, "prompt.1", "must be"),
        ({"prompt": "x" * 21}, "prompt", "has 21 characters; at most 20 are allowed"),
        ({"prompt": ["x"] * 4}, "prompt", "has 4 items; at most 3"),
        ({"prompt": [True]}, "prompt.0", "found true or false"),
        ({"prompt": [-1]}, "prompt.0", "must be"),
        ({"max_tokens": 0}, "max_tokens", "is 0; it must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "must be an integer or null, found a number"),
        ({"max_tokens": True}, "max_tokens", "must be an integer"),
        ({"top_p": 0}, "top_p", "must be above 0"),
        ({"seed": 10**400}, "seed", r"is 100000\.\.\. \(401 digits\); it must be at most"),  # no float holds it
        ({"temperature": -(10**400)}, "temperature", "it must be at least 0"),
        ({"top_p": -(10**400)}, "top_p", "it must be above 0"),
        ({"prompt": [10**400]}, "prompt.0", "it must be at most"),
        ({"echo": True}, "echo", "the text is not given back"),
        ({"presence_penalty": 1}, "presence_penalty", "repetition_penalty instead"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "at most 0"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"stream_options": {"other": 1}}, "stream_options.other", "is not supported"),
        ({"best_off": 2}, "best_off", "is not supported; known: model"),
    ],
)
def test_what_does_not_fit_is_named(more: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message) as caught:
        check(bodies.completions(LIMITS), {**COMPLETION, **more})
    assert caught.value.where == where


@pytest.mark.parametrize(
    "more",
    [
        {"safety_identifier": "a", "prompt_cache_key": "b"},
        {"functions": None, "function_call": "none", "audio": None, "prediction": None, "reasoning_effort": None},
    ],
)
def test_what_changes_no_answer_of_a_chat_fits(more: dict[str, Any]) -> None:
    check(bodies.chat(LIMITS), {**CHAT, **more})


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages.0.refusal"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
            "messages.0.content.0.type",
        ),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ],
)
def test_what_a_chat_cannot_do_is_named(more: dict[str, Any], where: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check(bodies.chat(LIMITS), {**CHAT, **more})
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "must be an object"),
        (b'{"model": NaN}', "NaN"),
        (b'{"model": "a", "model": "b"}', "duplicate key"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"model": "m", "prompt": "\\ud800"}', "surrogate"),
        (b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_bodies_that_are_no_json(data: bytes, message: str) -> None:
    with pytest.raises(Failure) as caught:
        read_body(data, bodies.completions(LIMITS))
    assert caught.value.status == 400
    assert message in caught.value.message


def test_a_pair_of_surrogates_is_a_character() -> None:
    body = read_body(b'{"model": "m", "prompt": "\\ud83d\\ude00"}', bodies.completions(LIMITS))
    assert body["prompt"] == "😀"
