"""What is computed once, measured on a base with room for a chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeprompt.bench.options import BenchOptions
from edgeprompt.bench.report import DEFINITIONS, Result
from edgeprompt.bench.reuse import TASKS, Reuse
from edgeprompt.options import EngineOptions
from edgeprompt.package.folder import open_package

OPTIONS = BenchOptions(input_tokens=(16, 64), repetitions=2, threads=(1,))
SETTINGS = EngineOptions(provider="cpu", threads=1, reuse_texts=False, allow_other_weights=True)
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
KEPT = ("tasks", "instruction", "chat_turn_2", "chat_turn_10")


@pytest.fixture(scope="module")
def roomy(tiny_llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporters import export_model

    folder = tmp_path_factory.mktemp("roomy")
    base = shutil.copytree(tiny_llama_base, folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    package = export_model(base, folder / "package", precision="fp32").path
    (package / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return package


def measured(path: Path) -> list[Result]:
    return [*Reuse(open_package(path), SETTINGS, OPTIONS).measure()]


def test_each_is_measured_with_texts_kept_and_without(roomy: Path) -> None:
    found = measured(roomy)
    assert {result.test for result in found} == {f"{test}_{way}" for test in KEPT for way in ("reused", "computed")}
    assert {result.test for result in found} <= set(DEFINITIONS)
    assert [result.n_prompt for result in found if result.test == "tasks_reused"] == [16, 64]
    assert {result.n_tasks for result in found if result.test.startswith("tasks")} == {TASKS}
    assert all(len(result.samples) == 2 and min(result.samples) > 0 for result in found)


def test_what_the_base_has_no_room_or_template_for_is_left_out(roomy: Path, tiny_llama_package: Path) -> None:
    short = {result.test for result in measured(tiny_llama_package)}  # 256 positions
    assert short == {"tasks_reused", "tasks_computed"}
    (roomy / "chat_template.jinja").rename(roomy / "away")
    assert not [result for result in measured(roomy) if result.test.startswith("chat")]
