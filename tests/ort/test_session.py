from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import onnxruntime
import pytest

import edgeprompt
from edgeprompt import EngineOptions
from edgeprompt.errors import InputError, PackageError, ProviderError
from edgeprompt.ort import processor
from edgeprompt.ort.session import HEAD_START, Sessions, choose_provider, open_session
from edgeprompt.package.folder import open_package

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def test_providers_by_short_and_full_name() -> None:
    assert choose_provider("cpu") == ("cpu", "CPUExecutionProvider")
    assert choose_provider("CPUExecutionProvider") == ("cpu", "CPUExecutionProvider")
    assert choose_provider("auto")[0] == ("cuda" if CUDA else "cpu")


@pytest.mark.skipif(CUDA, reason="CUDA is here")
def test_a_missing_provider_names_what_is_there_and_the_install() -> None:
    with pytest.raises(
        ProviderError, match=r"'cuda' is not available here \(available: .*cpu.*\); pip install onnxruntime-gpu"
    ):
        choose_provider("cuda")


def test_an_unknown_provider() -> None:
    with pytest.raises(ProviderError, match="'quantum' is not available"):
        choose_provider("quantum")


def test_threads_reach_the_session(tiny_llama_package: Path) -> None:
    session = open_session(tiny_llama_package / "model.onnx", provider="cpu", threads=1, spinning=False)
    assert session.provider == session.device == "cpu"
    assert session.ort.get_session_options().intra_op_num_threads == 1
    with pytest.raises(InputError, match="threads is 0"):
        open_session(tiny_llama_package / "model.onnx", threads=0)


def test_a_graph_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(PackageError, match=r"cannot load graph 'model.onnx'"):
        open_session(path, provider="cpu")


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("fma avx2", "x86_64", "1"),
        ("avx2 avx512_vnni", "x86_64", "0"),
        ("avx2 avx_vnni", "AMD64", "0"),
        ("asimd", "aarch64", "0"),
    ],
)
def test_signed_weights_saturate_nowhere(
    flags: str, machine: str, expected: str, tiny_llama_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "describe", lambda: f"flags : {flags}")
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    session = open_session(tiny_llama_package / "model.onnx", provider="cpu")
    assert session.ort.get_session_options().get_session_config_entry("session.x64quantprecision") == expected


def test_the_processor_is_named() -> None:
    assert processor.describe().strip()


def test_sessions_of_every_graph_are_opened_beside_the_caller(seq2seq_package) -> None:
    package = open_package(seq2seq_package("T5"))
    sessions = Sessions(package, EngineOptions(provider="cpu", threads=1))
    assert [sessions[key].provider for key in ("encoder", "decoder")] == ["cpu", "cpu"]
    assert sessions["encoder"] is sessions["encoder"]
    assert sessions["encoder"].ort.get_session_options().intra_op_num_threads == 1


def test_a_head_start_ends_with_its_time_or_with_the_sessions(tiny_llama_package: Path) -> None:
    sessions = Sessions(open_package(tiny_llama_package), EngineOptions(provider="cpu"))
    begun = time.monotonic()
    sessions.give_head_start()
    assert time.monotonic() - begun < 10 * HEAD_START
    _ = sessions["model"]
    sessions.give_head_start()


@pytest.mark.parametrize(("file", "told"), [("model.onnx", "has SHA-256"), ("tokenizer.json", "cannot read the token")])
def test_what_fails_beside_the_caller_is_told_once(
    file: str, told: str, tiny_llama_package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_llama_package, tmp_path / "package")
    (folder / file).write_text('{"model": 3}')
    with pytest.raises(PackageError, match=told):
        edgeprompt.load(folder)
    with pytest.raises(ProviderError, match="'quantum' is not available"):
        edgeprompt.load(tiny_llama_package, provider="quantum")
    for thread in threading.enumerate():
        if thread.name.startswith("edgeprompt-session"):
            thread.join(10)
            assert not thread.is_alive()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("spinning", "microseconds"), [(True, "1000"), (False, "0")])
def test_idle_threads_spin_for_a_while_or_never(spinning: bool, microseconds: str, tiny_llama_package: Path) -> None:
    session = open_session(tiny_llama_package / "model.onnx", provider="cpu", spinning=spinning)
    options = session.ort.get_session_options()
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == microseconds
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spinning))
