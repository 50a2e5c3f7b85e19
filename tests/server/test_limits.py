"""Who is let in, how much a client may send, and what the log holds."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import edgeprompt
from edgeprompt import InputError, Request, Runtime
from edgeprompt.server.gate import Keys
from edgeprompt.server.options import ServerOptions
from edgeprompt.server.process import open_socket
from tests.support.runtimes import QUIET, hold, load_with_prompts
from tests.support.server import Running, serving

SECRET = "sk-test-5f8d0c"  # of these tests alone
BODY = {"model": "words", "input": "the film was good"}


@pytest.fixture(scope="module")
def runtime(tiny_llama_package: Path) -> Iterator[Runtime]:
    with load_with_prompts(tiny_llama_package) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def keyed(runtime: Runtime) -> Iterator[Running]:
    """A server with two keys and small limits."""
    with serving(
        runtime, api_keys=("other-key", SECRET), max_body=2000, max_text=500, max_inputs=4, max_streams=1
    ) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), bearer(SECRET[:-1]), bearer("."), {"Authorization": SECRET}])
def test_without_a_key_nobody_is_answered(keyed: Running, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        found = keyed.get(path, headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert found.headers["www-authenticate"] == "Bearer"
    assert keyed.post("/v1/classify", BODY, headers=headers).status_code == 401
    assert keyed.get("/health", headers=headers).status_code == 200


def test_each_key_is_let_in(keyed: Running) -> None:
    for key in (SECRET, "other-key"):
        assert keyed.post("/v1/classify", BODY, headers=bearer(key)).status_code == 200
    assert SECRET not in keyed.written
    assert "key" in keyed.get("/openapi.json").json()["components"]["securitySchemes"]


def test_keys_are_kept_as_hashes() -> None:
    keys = Keys((SECRET, "other"))
    assert keys.fit(SECRET.encode())
    assert not keys.fit(b"")
    assert not keys.fit("ü".encode())
    assert SECRET not in repr(vars(keys))
    assert SECRET not in repr(ServerOptions(api_keys=(SECRET,)))
    assert not Keys(())


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "ümlaut"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="API key") as caught:
        ServerOptions(api_keys=(key,))
    assert not key or key not in str(caught.value)


def test_another_address_needs_a_key() -> None:
    with pytest.raises(InputError, match="no key is set"):
        open_socket(ServerOptions(host="0.0.0.0", port=0))
    for options in (ServerOptions(host="0.0.0.0", port=0, api_keys=(SECRET,)), ServerOptions(host="::1", port=0)):
        open_socket(options).close()
    open_socket(ServerOptions(host="0.0.0.0", port=0, allow_unauthenticated=True)).close()


def test_an_address_that_cannot_be_bound_is_named(keyed: Running) -> None:
    port = int(keyed.url.rpartition(":")[2])
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}: .*--port"):
        open_socket(ServerOptions(port=port))
    with pytest.raises(InputError, match="no address of this machine"):
        open_socket(ServerOptions(host="no.such.host.invalid"))


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80"])
def test_another_sites_name_is_not_answered(decoder: Running, host: str) -> None:
    """A page whose name was made to point at loopback (DNS rebinding) sends its own name."""
    found = decoder.post("/v1/classify", BODY, headers={"Host": host})
    assert (found.status_code, found.json()["error"]["code"]) == (403, "wrong_host")


def test_names_of_loopback_are_answered(decoder: Running) -> None:
    port = decoder.url.rpartition(":")[2]
    for host in (f"localhost:{port}", "LOCALHOST", "[::1]:80", "127.0.0.1"):
        assert decoder.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_page_of_another_site_cannot_post(decoder: Running) -> None:
    """Browsers send these kinds across origins without asking the server first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        found = httpx.post(f"{decoder.url}/v1/classify", content=json.dumps(BODY), headers={"Content-Type": kind})
        assert found.status_code == 415
    kind = "application/json; charset=utf-8"
    found = httpx.post(f"{decoder.url}/v1/classify", content=json.dumps(BODY), headers={"Content-Type": kind})
    assert found.status_code == 200
    assert "access-control-allow-origin" not in found.headers


def test_sizes_are_limited(keyed: Running) -> None:
    def ask(body: Any, path: str = "classify") -> httpx.Response:
        return keyed.post(f"/v1/{path}", body, headers=bearer(SECRET))

    assert ask({**BODY, "input": "x" * 2000}).status_code == 413
    assert "500" in ask({**BODY, "input": "x" * 501}).json()["error"]["message"]
    assert ask({**BODY, "input": ["x"] * 5}).json()["error"]["param"] == "input"
    many = {"model": "story", "prompt": ["a", "b", "c"], "n": 2, "max_tokens": 2}
    assert ask(many, "completions").json()["error"]["code"] == "too_many"
    messages = [{"role": "user", "content": "x" * 200}] * 3
    assert ask({"model": "story", "messages": messages}, "chat/completions").json()["error"]["code"] == "text_too_long"
    pieces = (b"x" * 100 for _ in range(100))  # chunked: no length is announced
    headers = {**bearer(SECRET), "Content-Type": "application/json"}
    assert httpx.post(f"{keyed.url}/v1/classify", content=pieces, headers=headers).status_code == 413


def test_streams_are_limited(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = hold(keyed.runtime, monkeypatch)
    body = {"model": "story", "prompt": "a", "max_tokens": 20, "stream": True}
    headers = bearer(SECRET)
    with httpx.stream("POST", f"{keyed.url}/v1/completions", json=body, headers=headers, timeout=60) as first:
        assert begun.wait(20)
        second = keyed.post("/v1/completions", body, headers=headers)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
        assert int(second.headers["retry-after"]) >= 1
        go.set()
        assert first.read().endswith(b"data: [DONE]\n\n")
    assert keyed.post("/v1/completions", body, headers=headers).status_code == 200


def test_a_full_queue_is_429(tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    options = replace(QUIET, max_batch=1, max_queue=2)
    with edgeprompt.load(tiny_llama_package, options=options) as runtime, serving(runtime) as server:
        begun, go = hold(runtime, monkeypatch)
        running = runtime.submit(Request("a", task="generate"))
        assert begun.wait(20)
        waiting = runtime.submit(Request("a", task="generate"))
        base = runtime.manifest.base.name
        found = server.post("/v1/completions", {"model": base, "prompt": ["a", "b"]})
        assert (found.status_code, found.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(found.headers["retry-after"]) >= 1
        assert runtime.status().waiting == 1  # none of both was queued
        metrics = server.get("/metrics").text
        assert "edgeprompt_queue_requests 1.0" in metrics
        assert "edgeprompt_running_requests 1.0" in metrics
        go.set()
        assert running.result(20).token_ids
        assert waiting.result(20).token_ids
        assert server.post("/v1/completions", {"model": base, "prompt": ["a", "b"], "max_tokens": 2}).status_code == 200


NAMES = [
    "../words",
    "..",
    ".",
    "/etc/passwd",
    "words/../words",
    "a\0b",
    "\ud800",
    "x" * 256,
    "%2e%2e%2fwords",
    "words\n",
]


@pytest.mark.parametrize("name", NAMES)
def test_path_tricks_find_nothing(runtime: Runtime, tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    edgeprompt.save_prompt(runtime.prompt("words"), tmp_path / "secret.safetensors")
    with edgeprompt.load(runtime._package.path, options=QUIET) as other:
        other.add_folder(inside)
        with serving(other) as server:
            for model in (name, "../secret", f"{tmp_path}/secret"):
                found = server.post("/v1/classify", {"model": model, "input": "a"})
                assert found.status_code in (400, 404), found.text
                assert found.status_code == 404 or "surrogate" in found.text
            for path in ("..%2fsecret", "%2e%2e/secret", "..%5csecret", "../secret"):
                assert server.get(f"/v1/models/{path}").status_code == 404
            with pytest.raises(edgeprompt.PromptNotFoundError):
                other.classify("a", prompt=name)


def test_the_log_names_requests_and_holds_no_texts(decoder: Running) -> None:
    headers = {"X-Request-ID": "mine-1"}
    text = "a private sentence"
    found = decoder.post("/v1/classify", {"model": "words", "input": text}, headers=headers)
    assert found.headers["x-request-id"] == "mine-1"
    assert found.json()["id"] == "cls-mine-1"
    decoder.post("/v1/completions", {"model": "story", "prompt": text, "max_tokens": 100_000})
    decoder.post("/v1/completions", {"model": text, "prompt": "a"})
    decoder.post("/v1/completions", {"model": "story", "prompt": "a", text: 1})
    decoder.get(f"/v1/{text}")
    decoder.post("/v1/classify", BODY, headers={"X-Request-ID": 'bad" id\\'})
    decoder.post("/v1/answer", {"model": "words"})
    assert decoder.logged(endpoint="/v1/answer")["status"] == 400
    assert "private" not in decoder.written
    line = decoder.logged(id="mine-1")
    assert {name: line[name] for name in ("event", "endpoint", "model", "status")} == {
        "event": "request",
        "endpoint": "/v1/classify",
        "model": "words",
        "status": 200,
    }
    assert line["ms"] > 0
    assert line["input_tokens"] > 0
    assert all(set(one["id"]) <= set("0123456789abcdef") for one in decoder.log if one.get("id", "mine-1") != "mine-1")


def test_texts_are_logged_where_the_operator_asks(runtime: Runtime) -> None:
    with serving(runtime, log_texts=True) as server:
        server.post("/v1/completions", {"model": "story", "prompt": "a public sentence", "max_tokens": 3})
        text = server.logged(endpoint="/v1/completions")["text"]
        assert text["asked"]["prompt"] == "a public sentence"
        assert text["answered"] == [runtime.generate("a public sentence", prompt="story", max_new_tokens=3).text]


def test_an_unforeseen_error_is_500_and_its_words_stay_out(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("about a private sentence")

    with serving(runtime) as server:
        monkeypatch.setattr(runtime, "submit_all", broken)
        found = server.post("/v1/classify", BODY)
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        failed = server.logged(event="failed")
        assert "private" not in found.text + server.written
        assert failed["causes"][0]["kind"] == "ZeroDivisionError"
        assert "broken" in failed["causes"][0]["at"][-1]


def test_a_body_that_does_not_come_is_given_up(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprompt.server.app.READ_TIMEOUT", 0.3)
    with (
        serving(runtime) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as link,
    ):
        link.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"mod'
        )
        link.settimeout(20)
        assert link.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(("answered", "sent"), [(False, b""), (False, b"GET /health HT"), (True, b"GET /health HT")])
def test_a_connection_without_a_request_makes_room(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, answered: bool, sent: bytes
) -> None:
    monkeypatch.setattr("edgeprompt.server.app.READ_TIMEOUT", 0.3)
    with serving(runtime, max_connections=4 + answered) as running:
        held = [socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) for _ in range(4)]
        for one in held:
            one.settimeout(10)
            if answered:
                one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert one.recv(4096).startswith(b"HTTP/1.1 ")
            one.sendall(sent)
        for one in held:
            while one.recv(4096):
                pass
            one.close()
        assert running.get("/health").status_code == 200
        body = {"model": "story", "prompt": "a", "max_tokens": 200}  # what is being answered may take longer
        assert running.post("/v1/completions", body).status_code == 200


def test_metrics(decoder: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    decoder.post("/v1/completions", {"model": "story", "prompt": "a", "max_tokens": 3})
    found = decoder.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }
    assert samples["edgeprompt_requests_total", "/v1/completions", "200", "story"] >= 1
    assert samples["edgeprompt_tokens_total", "output"] >= 3
    assert samples["edgeprompt_request_seconds_count", "/v1/completions"] >= 1
    assert samples["edgeprompt_time_to_first_token_seconds_count",] >= 1
    assert samples["edgeprompt_resident_prefixes",] == decoder.runtime.status().resident_prefixes == 2
    assert samples["edgeprompt_resident_prefix_bytes",] > 0
    assert samples["edgeprompt_streams",] == 0
