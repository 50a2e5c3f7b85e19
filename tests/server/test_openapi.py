"""The document is valid, and the server does what its own document says, whatever a client sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.support.server import Running

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
MODES = {"valid": GenerationMode.POSITIVE, "invalid": GenerationMode.NEGATIVE}
TOKENS = 4
"""Most that a case generates: it is about the form."""
SIMPLE = {
    "prompt": "a text",
    "input": ["a text"],
    "question": "a question",
    "context": "a text",
    "messages": [{"role": "user", "content": "a text"}],
    "dimensions": None,
}
"""What can be answered; half of the cases have it."""


def operations(server: Running) -> dict[str, Any]:
    """What the document offers, by path."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = (result.ok() for result in schema.get_all_operations())
    return {operation.path: operation for operation in found}


@pytest.fixture(params=["chatting", "encoder"])
def server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def ask(server: Running, mode: str, examples: int) -> Counter[int]:
    """Ask every operation `examples` times; how often which status came."""
    names = [server.runtime.manifest.base.name, *server.runtime.prompts]
    asked: Counter[int] = Counter()
    for operation in operations(server).values():
        bodies = operation.method == "post"
        if mode == "invalid" and not bodies:
            continue

        @settings(
            max_examples=examples if bodies else max(3, examples // 20),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        )
        @given(
            case=operation.as_strategy(generation_mode=MODES[mode]),
            name=st.sampled_from([None, *names, *names]),
            simple=st.booleans(),
        )
        def check(case: Any, name: str | None, simple: bool) -> None:
            if isinstance(case.body, dict) and mode == "valid":
                if name is not None:
                    case.body["model"] = name
                if simple:
                    case.body |= {key: value for key, value in SIMPLE.items() if key in case.body}
                if "prompt" in case.body or "messages" in case.body:
                    case.body["max_tokens"] = TOKENS
                    case.body.pop("max_completion_tokens", None)
            response = case.call()
            asked[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)
            if mode == "invalid":
                assert 400 <= response.status_code < 500, response.text

        check()
    return asked


def test_the_document_is_valid(decoder: Running) -> None:
    found = operations(decoder)  # schemathesis leaves out the document itself
    assert set(found) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/tag",
        "/v1/answer",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/metrics",
    }
    document = decoder.get("/openapi.json").json()
    schemathesis.openapi.from_dict(document).validate()


def test_what_the_document_allows_is_answered(server: Running) -> None:
    found = ask(server, "valid", 8)
    assert found[200] > 10
    assert found.total() > 35


def test_what_the_document_forbids_is_an_error_of_the_client(server: Running) -> None:
    assert ask(server, "invalid", 10).total() >= 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_cases(chatting: Running, encoder: Running) -> None:
    assert sum(ask(one, mode, 1300).total() for one in (chatting, encoder) for mode in MODES) > 20_000
