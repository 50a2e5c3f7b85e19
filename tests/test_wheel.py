"""The artefact: the built wheel, in an environment with only the `cpu` extra."""

import json
import os
import subprocess
import zipfile

import pytest

import edgeprompt
from tests.support.wheel import ROOT, ask, build_wheel, environment

HEAVY = ("torch", "transformers", "peft", "onnx", "optimum", "accelerate", "datasets", "sklearn")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def minimal(wheel, tmp_path_factory):
    """Python of an environment that holds the wheel with the `cpu` extra and nothing else."""
    return environment(tmp_path_factory.mktemp("minimal"), wheel, "cpu")


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"edgeprompt", "exporters", f"edgeprompt-{edgeprompt.__version__}.dist-info"}
    assert {"edgeprompt/py.typed", f"edgeprompt-{edgeprompt.__version__}.dist-info/licenses/LICENSE"} <= set(names)
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("edgeprompt", "exporters")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_heavy_libraries_are_absent(minimal):
    code = f"from importlib.util import find_spec; print([name for name in {HEAVY} if find_spec(name)])"
    assert ask(minimal, "-c", code).strip() == "[]"


def test_import_help_and_a_real_run(minimal, tiny_llama_package):
    assert ask(minimal, "-c", "import edgeprompt; print(edgeprompt.__version__)").strip() == edgeprompt.__version__
    edge = minimal.parent / "edgeprompt"
    assert "tune" in ask(minimal, edge, "--help")
    args = ("run", tiny_llama_package, "Once upon a time", "--max-new-tokens", 8, "--json")
    found = json.loads(ask(minimal, edge, *args))
    with edgeprompt.load(tiny_llama_package) as here:
        assert tuple(found["token_ids"]) == here.generate("Once upon a time", max_new_tokens=8).token_ids


def test_a_command_that_needs_more_says_what_to_install(minimal, tmp_path):
    edge = minimal.parent / "edgeprompt"
    done = subprocess.run(
        [minimal, "-I", edge, "export", "base", "-o", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "pip install 'edgeprompt[" in line
    assert os.listdir(tmp_path) == []
