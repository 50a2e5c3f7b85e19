"""The runtime is light: what a device imports, checked in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprompt.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SERVER = {"starlette", "uvicorn", "anyio", "prometheus_client"}
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "exporters",
    "optimum",
    "datasets",
    "accelerate",
    "sklearn",
    "gguf",
    "ray",
)


def modules_after(code, *args):
    """Top-level modules that a fresh interpreter holds after `code`."""
    ending = "\nimport sys\nprint('\\nMODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + ending, *map(str, args)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("MODULES", 1)[1].split()), done.stdout


def command(*args):
    return f"from edgeprompt.cli import main\nmain({[str(arg) for arg in args]}, standalone_mode=False)"


def test_import():
    found, _ = modules_after("import edgeprompt")
    assert not found & set(HEAVY)
    assert not found & {"rich", "onnxruntime", "numpy", "tokenizers"}


def test_what_loads_a_package_waits_for_nothing_heavy():
    found, _ = modules_after("import edgeprompt\nedgeprompt.load, edgeprompt.EngineOptions")
    assert not found & {*HEAVY, "rich", "onnxruntime", "numpy", "tokenizers", "safetensors"}


def test_public_names_come_on_first_use():
    found, _ = modules_after(
        "import edgeprompt\nassert all(hasattr(edgeprompt, name) for name in edgeprompt.__all__)\n"
        "assert not hasattr(edgeprompt, 'no_such_name')\nfrom edgeprompt import *\nload, Request, EdgePromptError"
    )
    assert not found & set(HEAVY)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name):
    found, _ = modules_after(command(*filter(None, [name]), "--help"))
    assert not found & set(HEAVY)
    assert not found & {"rich", "onnxruntime", *SERVER}


def test_a_real_run(tiny_llama_package):
    found, out = modules_after(command("run", tiny_llama_package, "Once upon a time", "--max-new-tokens", 4, "--json"))
    assert '"token_ids"' in out
    assert "onnxruntime" in found
    assert not found & {*HEAVY, *SERVER}


def test_the_check_sees_what_it_looks_for():
    found, _ = modules_after("import exporters.export")
    assert {"exporters", "numpy"} <= found


def test_only_the_command_line_imports_the_exporter():
    for path in sorted((ROOT / "edgeprompt").rglob("*.py")):
        if "cli" not in path.parts:
            tree = ast.parse(path.read_text("utf-8"))
            modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            assert not [module for module in modules if module.partition(".")[0] == "exporters"], path
