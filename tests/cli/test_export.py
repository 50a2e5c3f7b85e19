"""`export` and `validate`: a package or nothing."""

import json
import os
import resource
import shutil
import signal
import time

import pytest

from edgeprompt import save_prompt
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Base


@pytest.fixture(scope="module")
def exported(cli, tiny_llama_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "package"
    result = cli("export", tiny_llama_base, "-o", out, "--precision", "int4")
    assert result.exit_code == 0, result.stderr
    return out, result.stdout


def test_export_writes_a_package_and_says_what_it_measured(exported):
    out, text = exported
    assert os.listdir(out.parent) == ["package"]
    manifest = open_package(out).manifest
    assert manifest.precision == "int4"
    assert text.startswith(f"{out}: ")
    assert f"top1_agreement: {manifest.validation['top1_agreement']:.6g}\n" in text


def test_validate_agrees(cli, exported, tiny_llama_base):
    out, _ = exported
    result = cli("validate", out, "--against", tiny_llama_base, "--json")
    assert result.exit_code == 0, result.stderr
    manifest = open_package(out).manifest
    measured = json.loads(result.stdout)
    assert set(measured) == {*manifest.validation, "quality", "quality_gate"}
    assert (measured["quality"], measured["quality_gate"]) == (manifest.quality, manifest.quality_gate)


def test_validate_refuses_another_base_and_a_changed_graph(
    refused, exported, tiny_gpt2_base, tiny_llama_base, tmp_path
):
    out, _ = exported
    assert "was exported from" in refused("validate", out, "--against", tiny_gpt2_base)
    copy = shutil.copytree(out, tmp_path / "copy")
    graph = next(copy.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes() + b"\0")
    assert "has SHA-256" in refused("validate", copy, "--against", tiny_llama_base)


def test_an_existing_output_is_kept_without_force(cli, refused, exported, tiny_llama_base):
    out, _ = exported
    before = (out / "edgeprompt.json").read_bytes()
    assert "give --force" in refused("export", tiny_llama_base, "-o", out)
    assert (out / "edgeprompt.json").read_bytes() == before
    assert cli("export", tiny_llama_base, "-o", out, "--precision", "int4", "--force").exit_code == 0
    assert os.listdir(out.parent) == ["package"]


def test_a_graph_that_onnx_runtime_does_not_open_is_one_line(cli, tiny_llama_base, tmp_path):
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": -0.5}))
    result = cli("export", base, "-o", tmp_path / "out", "--precision", "fp32")
    assert result.exit_code == 1
    assert "error: ONNX Runtime cannot load model.onnx:" in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_refusals_leave_nothing(refused, make_prompt, tiny_llama_base, smollm2_gguf, tmp_path):
    out = tmp_path / "out" / "package"
    base = tmp_path / "unknown"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "mamba"}')
    line = refused("export", base, "-o", out)
    assert "mamba" in line
    assert "llama" in line
    assert "no base model at" in refused("export", "./missing", "-o", out)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_gguf.read_bytes()[:100_000])
    assert "is cut short or no GGUF file" in refused("export", cut, "-o", out)
    other = tmp_path / "other.safetensors"
    save_prompt(make_prompt("other", base=Base("another-model", "sha256:00")), other)
    line = refused("export", tiny_llama_base, "-o", out, "--prompt", other)
    assert "another-model" in line
    assert not out.exists()
    assert not any((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_killed_during_export_leaves_nothing(number, spawn, tiny_llama_base, tmp_path):
    out = tmp_path / "package"
    with spawn("export", tiny_llama_base, "-o", out) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(tmp_path.iterdir()), "the export began to write"
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in error
    assert "Aborted" in error if number == signal.SIGINT else error == "error: stopped by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(spawn, tiny_llama_base, tmp_path):
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "package"
    with spawn("export", tiny_llama_base, "-o", out, preexec_fn=small_files) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    # A slow machine tells of progress before.
    lines = [line for line in error.splitlines() if not line.startswith("export: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--data", "--calibration"])
def test_a_wrong_path_of_texts_is_told_before_the_work(refused, tiny_llama_base, tmp_path, monkeypatch, option):
    monkeypatch.setattr("exporters.export.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    out, missing = tmp_path / "package", tmp_path / "no.csv"
    args = ("export", tiny_llama_base, "-o", out, "--precision", "int8")
    assert f"no data file at {str(missing)!r}" in refused(*args, option, missing)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "holds no text" in refused(*args, option, empty)
