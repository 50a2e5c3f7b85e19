"""Packages without our runtime, by the examples that the guides show, token by token against PEFT."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeprompt
from exporters import convert_prompt, export_model
from tests.support.runtimes import QUIET

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/onnxruntime"
VOCAB, NEW = 512, 12
TEXTS = ([5, 9, 21, 7, 30], [11, 40, 2])


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks(
    tiny_llama_base: Path, tiny_llama_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[list[int]]]]:
    """Two PEFT prompts of different length as prompt files, with what PEFT generates behind them."""
    import peft
    from transformers import AutoModelForCausalLM

    home, found = tmp_path_factory.mktemp("tasks"), {}
    for name, config in (
        ("prompt-tuning", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
        ("p-tuning", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)),
    ):
        torch.manual_seed(len(name))
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_base), config).eval()
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        model.save_pretrained(home / name)
        convert_prompt(home / name, home / f"{name}.safetensors", base=tiny_llama_package)
        told = []
        for ids in TEXTS:
            given = torch.tensor([ids])
            made = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
            )[0].tolist()
            new = made[len(ids) :] if made[: len(ids)] == ids else made
            told.append(new[: new.index(0)] if 0 in new else new)
        assert any(told)
        found[name] = home / f"{name}.safetensors", told
    assert found["prompt-tuning"][1] != found["p-tuning"][1]
    return found


@pytest.fixture(scope="module")
def adapter_package(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tiny_llama_base, tmp_path_factory.mktemp("optional") / "adapter", prompt_input="optional").path


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


def test_stock_python_swaps_tasks_by_adapter(adapter_package: Path, tasks: Any, tmp_path: Path) -> None:
    script = example("stock_python")
    base, loaded = script.Base(adapter_package), {}
    for name, (file, _) in tasks.items():
        convert_prompt(file, tmp_path / f"{name}.onnx_adapter")
        loaded[name] = script.Task(tmp_path / f"{name}.onnx_adapter")
    for index, ids in enumerate(TEXTS):  # task by task in turn, on one session
        for name, (_, told) in tasks.items():
            assert base.generate(loaded[name], ids, NEW) == told[index], name


def test_stock_python_without_adapter_is_the_base(adapter_package: Path, tiny_llama_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = example("stock_python").Base(adapter_package)
    logits, _ = base.run(list(TEXTS[0]), base.empty)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tiny_llama_base)(torch.tensor([TEXTS[0]])).logits[0, -1].numpy()
    assert np.abs(logits - want).max() < 1e-4


def test_stock_python_script(adapter_package: Path, tasks: Any, tmp_path: Path) -> None:
    convert_prompt(tasks["p-tuning"][0], tmp_path / "task.onnx_adapter")
    command = [
        sys.executable,
        str(EXAMPLES / "stock_python.py"),
        str(adapter_package),
        str(tmp_path / "task.onnx_adapter"),
    ]
    done = subprocess.run([*command, "the film"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_genai_runs_a_package_unchanged(tiny_llama_package: Path, tasks: Any) -> None:
    import onnxruntime_genai as og

    script, model = example("genai_python"), og.Model(str(tiny_llama_package))
    for file, told in tasks.values():
        for index, ids in enumerate(TEXTS):
            assert until_end(script.generate(model, VOCAB, [(0, ids)], [table(file)], NEW)[0]) == told[index]


def test_genai_answers_at_int8_as_the_runtime_does(tiny_llama_base: Path, tmp_path: Path) -> None:
    """On every processor: without VNNI, products of 8-bit weights are added in 16 bits unless ONNX Runtime is told."""
    import onnxruntime_genai as og

    package = export_model(tiny_llama_base, tmp_path / "int8", route="genai", precision="int8").path
    config = json.loads((package / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["session.x64quantprecision"] == "1"
    script, model = example("genai_python"), og.Model(str(package))
    rows = np.zeros((1, 64), np.float32)
    with edgeprompt.load(package, options=QUIET) as runtime:
        for ids in TEXTS:
            want = list(runtime.generate(input_ids=ids, max_new_tokens=NEW).token_ids)
            assert until_end(script.generate(model, VOCAB, [(None, ids)], [rows], NEW)[0]) == want


def table(file: Path) -> Any:
    from edgeprompt import load_prompt

    return load_prompt(file).prompt_embeddings


@pytest.fixture(scope="module")
def all_logits_package(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GenAI builder's own folder at fp32, grafted: logits at every position."""
    home = tmp_path_factory.mktemp("builder")
    command = [sys.executable, "-W", "ignore", "-m", "onnxruntime_genai.models.builder", "-i", str(tiny_llama_base)]
    done = subprocess.run(
        [*command, "-o", str(home / "built"), "-p", "fp32", "-e", "cpu", "-c", str(home / "cache")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return export_model(home / "built", home / "out", route="onnx", against=tiny_llama_base).path


def test_genai_serves_two_tasks_in_one_ragged_batch(all_logits_package: Path, tasks: Any) -> None:
    import onnxruntime_genai as og

    script, model = example("genai_python"), og.Model(str(all_logits_package))
    names = list(tasks)
    tables = [table(tasks[name][0]) for name in names]
    requests = [(0, TEXTS[0]), (1, TEXTS[1]), (1, TEXTS[0]), (0, TEXTS[1])]
    want = [tasks[names[0]][1][0], tasks[names[1]][1][1], tasks[names[1]][1][0], tasks[names[0]][1][1]]
    found = script.generate(model, VOCAB, requests, tables, NEW, pad=1)
    assert [until_end(row) for row in found] == want


def test_stock_python_batches_tasks_of_any_length(tiny_llama_package: Path, tasks: Any, tmp_path: Path) -> None:
    script, names = example("batch_python"), list(tasks)
    tables = [table(tasks[name][0]) for name in names]
    base = script.Base(tiny_llama_package)
    requests = [(0, TEXTS[0]), (1, TEXTS[1]), (None, TEXTS[1]), (1, TEXTS[0]), (0, TEXTS[1])]
    found = base.generate(requests, tables, NEW)
    told = [tasks[names[task]][1][TEXTS.index(ids)] for task, ids in requests if task is not None]
    assert [row for row, (task, _) in zip(found, requests, strict=True) if task is not None] == told
    assert found[2] == base.generate([(None, TEXTS[1])], tables, NEW)[0]
    files = []
    for name in names:
        convert_prompt(tasks[name][0], tmp_path / f"{name}.npy")
        files.append(str(tmp_path / f"{name}.npy"))
    command = [sys.executable, str(EXAMPLES / "batch_python.py"), str(tiny_llama_package), "the film", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="session")
def node_example(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs the Node.js example; skips where Node.js or its package is not there."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    home = tmp_path_factory.getbasetemp().parent / "node-example"
    if not (home / "node_modules/onnxruntime-node").exists():
        home.mkdir(exist_ok=True)
        shutil.copy(EXAMPLES / "node/package.json", home)
        installed = subprocess.run(
            ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=home, capture_output=True, text=True
        )
        if installed.returncode:
            pytest.skip(f"npm cannot install onnxruntime-node here: {installed.stderr.strip()[-200:]}")
    shutil.copy(EXAMPLES / "node/generate.mjs", home)

    def run(*arguments: str) -> str:
        done = subprocess.run(["node", "generate.mjs", *arguments], cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_node(node_example: Callable[..., str], tiny_llama_package: Path, tasks: Any) -> None:
    for file, told in tasks.values():
        ids = ",".join(map(str, TEXTS[1]))
        assert json.loads(node_example(str(tiny_llama_package), str(file), ids))[:NEW] == told[1]


HEADERS_PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
"""npm's package of ONNX Runtime for Unity: of the package indices, the one that carries the C and C++ headers."""


@pytest.fixture(scope="session")
def cpp_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built against onnxruntime's own library; skips where a tool or the headers are not there."""
    import onnxruntime

    for tool in ("g++", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    home = tmp_path_factory.getbasetemp().parent / "cpp-example"
    if not (headers := _headers(home)):
        home.mkdir(exist_ok=True)
        packed = subprocess.run(["npm", "pack", HEADERS_PACKAGE], cwd=home, capture_output=True, text=True)
        if packed.returncode:
            pytest.skip(f"npm cannot fetch {HEADERS_PACKAGE} here: {packed.stderr.strip()[-200:]}")
        (archive,) = home.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(home, [m for m in tar.getmembers() if "/ios-arm64/" in m.name], filter="data")
        archive.unlink()
        headers = _headers(home)
    soname = home / "libonnxruntime.so.1"
    soname.unlink(missing_ok=True)
    soname.symlink_to(library)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-isystem", str(headers[0].parent)]
    command += [str(EXAMPLES / "cpp/generate.cpp"), str(soname), f"-Wl,-rpath,{home}", "-o", str(home / "generate")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return home / "generate"


def _headers(home: Path) -> list[Path]:
    return list(home.glob("package/**/onnxruntime_cxx_api.h"))


def test_cpp_swaps_tasks_by_adapter(cpp_example: Path, adapter_package: Path, tasks: Any, tmp_path: Path) -> None:
    adapters = []
    for name, (file, _) in tasks.items():
        convert_prompt(file, tmp_path / f"{name}.onnx_adapter")
        adapters.append(f"{tmp_path / name}.onnx_adapter:{len(table(file))}")
    for index, ids in enumerate(TEXTS):
        command = [str(cpp_example), str(adapter_package), str(NEW), ",".join(map(str, ids))]
        done = subprocess.run([*command, *adapters, adapters[0]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [[int(token) for token in line.split(",") if token] for line in done.stdout.splitlines()]
        told = [told[index] for _, told in tasks.values()]
        assert found == [*told, told[0]]


def test_stock_python_starts_on_a_prefix(tiny_llama_package: Path, tiny_llama_base: Path, tmp_path: Path) -> None:
    """Prefix tuning through plain past_key_values."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_base), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "prefix")
    convert_prompt(tmp_path / "prefix", tmp_path / "prefix.npy", base=tiny_llama_package)
    script = example("prefix_python")
    base = script.Base(tiny_llama_package)
    for ids in TEXTS:
        given = torch.tensor([ids])
        made = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
        )[0].tolist()
        assert script.generate(base, np.load(tmp_path / "prefix.npy"), ids, NEW) == until_end(made[len(ids) :])
    command = [
        sys.executable,
        str(EXAMPLES / "prefix_python.py"),
        str(tiny_llama_package),
        str(tmp_path / "prefix.npy"),
    ]
    done = subprocess.run([*command, "the film"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
