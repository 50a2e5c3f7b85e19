"""The triage app on a tiny package: lines, the service, and what it imports."""

import io
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import edgeprompt
from edgeprompt import EngineOptions, save_prompt
from tests.support.prompts import make_prompt

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "triage"
QUIET = EngineOptions(provider="cpu", threads=1, spinning=False, max_queue=8)
WORDS = {
    "sentiment": {"negative": (" bad",), "positive": (" good",)},
    "source": {"movie": (" film",), "product": (" it",), "tweets": (" a",), "news": (" the",)},
    "restore": {},
}


@pytest.fixture
def app(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import triage

    yield triage
    del sys.modules["triage"]


@pytest.fixture
def prompts(tiny_llama_package, tmp_path):
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        for name, words in WORDS.items():
            save_prompt(make_prompt(runtime.manifest, name, verbalizer=words), tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def triage(app, tiny_llama_package, prompts):
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        yield app.Triage(runtime, prompts)


def test_lines(app, triage, capsys):
    app.read_lines(triage, io.StringIO(f"the film\n\n{'too long ' * 300}\na story\n"))
    out, err = capsys.readouterr()
    assert err.startswith("not triaged: the request needs")
    assert sum(line.split(" ")[0] in ("answer", "later", "digest") for line in out.splitlines()) == 2
    assert out.splitlines()[-1].split()[0] == "message"
    summary = triage.latencies.summary()
    assert set(summary) == {"sentiment", "source", "restore", "message"}
    assert all(values["n"] == 2 and 0 < values["p50"] <= values["p95"] for values in summary.values())


def test_actions(app):
    assert app.action("negative", "product") == "answer now"
    assert app.action("negative", "movie") == "later"
    assert app.action("positive", "tweets") == "later"
    assert app.action("negative", "news") == "digest"


def test_percentiles(app):
    latencies = app.Latencies()
    for milliseconds in range(1, 101):
        latencies.add("message", milliseconds / 1000)
    assert latencies.summary()["message"] == {"n": 100, "p50": 51.0, "p95": 96.0}


def test_service(app, triage):
    server = app.make_server(triage, 0)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def ask(path, data=None):
        try:
            with urllib.request.urlopen(address + path, data, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    try:
        status, found = ask("/triage", json.dumps({"text": "the film"}).encode())
        assert status == 200
        assert found["sentiment"]["label"] in WORDS["sentiment"]
        assert set(found["milliseconds"]) == set(WORDS)
        assert ask("/latency")[1]["message"]["n"] == 1
        for body, says in (
            (b"{", "Expecting"),
            (b'{"text": 5}', "send"),
            (b'{"text": ""}', None),
            (json.dumps({"text": "good " * 400}).encode(), "the base holds 256"),
            (b" " * (app.LARGEST_BODY + 1), "bytes"),
        ):
            status, found = ask("/triage", body)
            assert (status, says in found["error"]) == (400, True) if says else status == 200
        assert ask("/nothing")[0] == ask("/nothing", b"{}")[0] == 404
        many = [threading.Thread(target=ask, args=("/triage", b'{"text": "a film"}')) for _ in range(8)]
        for one in many:
            one.start()
        for one in many:
            one.join()
        assert ask("/latency")[1]["message"]["n"] > 2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_needs_the_runtime_install_only(tiny_llama_package, prompts):
    code = (
        "import io, sys, runpy\n"
        f"sys.argv = ['triage.py', {str(tiny_llama_package)!r}, '--prompts', {str(prompts)!r}, '--threads', '1']\n"
        "sys.stdin = io.StringIO('the film\\n')\n"
        f"runpy.run_path({str(FOLDER / 'triage.py')!r}, run_name='__main__')\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'click', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "milliseconds" in done.stdout
