"""Extras are true: the wheel with one extra alone, in an environment of its own, does that extra's main job."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.wheel import ROOT, ask, build_wheel, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Python of the environment with one extra."""
    return cache(lambda extra: environment(tmp_path_factory.mktemp(extra), wheel, extra))


@pytest.fixture(scope="module")
def edgeprompt(python: Callable[[str], Path]) -> Callable[..., str]:
    """`edgeprompt(extra, *arguments)`: what the command line prints in the environment with that extra."""
    return lambda extra, *arguments: ask(python(extra), python(extra).parent / "edgeprompt", *arguments)


def test_cpu_serves(edgeprompt: Callable[..., str], tiny_llama_package: Path) -> None:
    assert '"token_ids"' in edgeprompt("cpu", "run", tiny_llama_package, "Once upon a time", "--json")


def test_export_exports(
    edgeprompt: Callable[..., str], tiny_llama_base: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    edgeprompt("export", "export", tiny_llama_base, "-o", tmp_path / "decoder", "--precision", "fp32")
    edgeprompt("export", "export", minilm_folder, "-o", tmp_path / "encoder", "--precision", "int8")
    edgeprompt("export", "validate", tmp_path / "decoder", "--against", tiny_llama_base)


def test_tune_tunes_for_a_package(
    edgeprompt: Callable[..., str], tiny_llama_base: Path, tiny_llama_package: Path, tmp_path: Path
) -> None:
    data = tmp_path / "reviews.csv"
    lines = [f"a {word} film number {i},{label}" for i in range(20) for word, label in (("good", "yes"), ("bad", "no"))]
    data.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    out = tmp_path / "prompt.safetensors"
    edgeprompt("tune", "tune", tiny_llama_base, data, "-o", out, "--for", tiny_llama_package, "--steps", 2)
    edgeprompt("tune", "run", tiny_llama_package, "a good film", "--prompt", out)


def test_plot_draws_and_compares(python: Callable[[str], Path]) -> None:
    code = (
        "from edgeprompt.bench import compare, load_report\n"
        "from edgeprompt.bench.page import to_html\n"
        f"report = load_report({str(ROOT / 'benchmarks/results/bench-smollm2-int4.json')!r})\n"
        "print(to_html(report).count('<svg'), compare(report, report).count('same within noise') > 5)"
    )
    assert ask(python("plot"), "-c", code).split() == ["4", "True"]


def test_ray_answers_files(edgeprompt: Callable[..., str], tiny_llama_package: Path, tmp_path: Path) -> None:
    data = tmp_path / "in.csv"
    data.write_text("text\nOnce upon a time\nThe film\n", encoding="utf-8")
    out = tmp_path / "out"
    edgeprompt("ray", "run", tiny_llama_package, "--input", data, "--output", out, "--engine", "ray", "--resume")
    (part,) = out.iterdir()
    assert part.read_text("utf-8").startswith("text,prompt,answer,score,error\n")
