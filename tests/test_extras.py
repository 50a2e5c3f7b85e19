"""Extras are true: the wheel with one extra alone, in an environment of its own, does that extra's main job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.wheel import ROOT, ask, build_wheel, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def python(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> Path:
    """Python of an environment with the extra that the test names."""
    return environment(tmp_path / "environment", wheel, request.param)


@pytest.fixture
def edgeprompt(python: Path) -> Callable[..., str]:
    """The command line of that environment; its stdout."""
    return lambda *arguments: ask(python, python.parent / "edgeprompt", *arguments)


@pytest.mark.parametrize("python", ["cpu"], indirect=True)
def test_cpu_serves(edgeprompt: Callable[..., str], tiny_llama_package: Path) -> None:
    assert '"token_ids"' in edgeprompt("run", tiny_llama_package, "Once upon a time", "--json")


@pytest.mark.parametrize("python", ["export"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_export_exports(
    edgeprompt: Callable[..., str], tiny_llama_base: Path, minilm_folder: Path, precision: str, tmp_path: Path
) -> None:
    edgeprompt("export", tiny_llama_base, "-o", tmp_path / "decoder", "--precision", "fp32")
    edgeprompt("export", minilm_folder, "-o", tmp_path / "encoder", "--precision", precision)
    edgeprompt("validate", tmp_path / "decoder", "--against", tiny_llama_base)


@pytest.mark.parametrize("python", ["tune"], indirect=True)
def test_tune_tunes_for_a_package(
    edgeprompt: Callable[..., str], tiny_llama_base: Path, tiny_llama_package: Path, tmp_path: Path
) -> None:
    data = tmp_path / "reviews.csv"
    lines = [f"a {word} film number {i},{label}" for i in range(20) for word, label in (("good", "yes"), ("bad", "no"))]
    data.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    out = tmp_path / "prompt.safetensors"
    edgeprompt("tune", tiny_llama_base, data, "-o", out, "--for", tiny_llama_package, "--steps", 2)
    edgeprompt("run", tiny_llama_package, "a good film", "--prompt", out)


@pytest.mark.parametrize("python", ["plot"], indirect=True)
def test_plot_draws_and_compares(python: Path) -> None:
    code = (
        "from edgeprompt.bench import compare, load_report\n"
        "from edgeprompt.bench.page import to_html\n"
        f"report = load_report({str(ROOT / 'benchmarks/results/bench-smollm2-int4.json')!r})\n"
        "print(to_html(report).count('<svg'), compare(report, report).count('same within noise') > 5)"
    )
    assert ask(python, "-c", code).split() == ["4", "True"]
