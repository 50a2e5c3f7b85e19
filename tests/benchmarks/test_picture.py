"""The README's picture shows what is in the committed result, and is drawn anew when that changes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers import picture


def test_the_committed_picture_is_of_the_committed_result(tmp_path: Path) -> None:
    report = json.loads(picture.RESULT.read_text(encoding="utf-8"))
    assert [tasks for tasks, _ in picture.memory(report)] == [1, 10, 100, 1000]
    target = tmp_path / "tasks.svg"
    picture.draw(report, target)
    text, committed = (path.read_text(encoding="utf-8") for path in (target, picture.PICTURE))
    for value in picture.first_token(report).values():
        assert f">{value:.0f}<" in committed.replace(" ", "").replace("\n", "")
    assert text.count("<text") == committed.count("<text")
