from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from edgeprompt import processor
from edgeprompt.errors import InputError, PackageError, ProviderError
from edgeprompt.session import choose_provider, open_session

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
