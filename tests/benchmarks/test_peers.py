"""The comparison's table, from a result of known numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.bases import BASES
from benchmarks.peers.table import (
    FAITHFUL,
    FAST,
    IN_README,
    OTHERS,
    PEER,
    UNKNOWN,
    divergences,
    group_of,
    ratios_to_markdown,
    summary_to_markdown,
    to_markdown,
    write_table,
)


def _round(speed: float, **changes: Any) -> dict[str, Any]:
    return {
        "ttft_cached": {"32": [0.1 / speed] * 3, "128": [0.3 / speed] * 3},
        "ttft_uncached": {"32": [0.2 / speed] * 3},
        "decode": [50 * speed] * 3,
        "classify": 10 * speed,
        "peak_rss": 2e8,
        "labels": [1, 0, 1, 0],
        **changes,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "base": "tiny",
        "model": "A tiny model",
        "new_tokens": 64,
        "snippets": 256,
        "threads": 2,
        "device": {"cpu": "a processor", "isa": ["AVX2"]},
        "time": "2026-01-02T03:04:05+00:00",
        "weight_bytes": 1e8,
        "ceiling_bytes_per_second": [2e10],
        "peers": {
            "edgeprompt": {"title": "ours", "rounds": [_round(2), _round(2)]},
            "other": {"title": "other", "rounds": [_round(1), _round(0.5)]},
            "gone": {"title": "gone", "rounds": [], "absent": "no wheel"},
        },
    }


def test_ratios_of_medians_with_their_spread(result: dict[str, Any]):
    lines = ratios_to_markdown(result).splitlines()
    ratio = lines[-1 - next(n for n, line in enumerate(reversed(lines)) if line.startswith("| other"))]
    cells = [cell.strip() for cell in ratio.split("|")[3:-1]]
    assert cells[3] == "2.67 (2.00 to 4.00)"  # 100 tokens/s beside a median of 37.5
    assert cells[0] == "3.00 (2.00 to 4.00)"
    assert cells[5] == "1.00 (1.00 to 1.00)"


def test_absent_peers_and_the_ceiling_are_said(result: dict[str, Any]):
    text = to_markdown(result)
    assert "gone: absent (no wheel)" in text
    assert "| gone |  | absent |" in text
    assert "bound decoding at 200 tokens/s, of which edgeprompt reaches 50%" in text


def test_labels_are_compared_with_full_precision(result: dict[str, Any]):
    result["peers"]["pytorch"] = {"title": "fp32", "rounds": [_round(1, labels=[1, 1, 1, 0])]}
    assert "Labels equal to those of PyTorch in fp32: ours 75%, other 75%." in to_markdown(result)


def test_rounds_with_the_cores_apart_count_only_where_there_is_no_other(result: dict[str, Any]):
    near, apart = {"core_round_trip_ns": [200, 210]}, {"core_round_trip_ns": [200, 600]}
    result["peers"]["edgeprompt"]["rounds"] = [_round(2, **near), _round(8, **apart)]
    result["peers"]["other"]["rounds"] = [_round(1, **apart), _round(3, **apart)]
    lines = to_markdown(result).splitlines()
    assert "| 100 |" in lines[2]
    assert "| 100 |" in lines[3], "the median of both"


def test_a_table_is_replaced_between_its_markers(result: dict[str, Any], tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- benchmarks: begin -->\nlast year\n<!-- benchmarks: end -->\nafter\n", encoding="utf-8"
    )
    for _ in range(2):
        write_table(readme, to_markdown(result))
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "last year" not in text
    assert text.count("| other |") == 1


def test_the_readme_has_two_rows_for_each_base(result: dict[str, Any]):
    result["peers"]["llamacpp"] = {"title": "llama.cpp, Q4", "rounds": [_round(1)]}
    rows = [line.split("|") for line in summary_to_markdown([result, result]).splitlines() if line.startswith("| ")]
    assert [row[2].strip() for row in rows[1:]] == ["---", *["llama.cpp", "edgeprompt"] * 2]
    assert rows[2][1].strip() == "A tiny model"
    assert [row[4].strip() for row in rows[2:4]] == ["100", "50"], "milliseconds to the first token"
    assert len(IN_README) * len(BASES) <= 6


def _kl(folder: Path, **bases: dict[str, float]) -> None:
    for name, means in bases.items():
        parts = {key: {"kl_mean": value} for key, value in means.items()}
        file = folder / ("kl.json" if name == "newest" else OTHERS)
        file.write_text(json.dumps({"bases": {"tiny": parts}}), encoding="utf-8")


def test_what_computes_something_else_is_a_group_of_its_own(result: dict[str, Any], tmp_path: Path) -> None:
    result["peers"]["llamacpp"] = {"title": "llama", "rounds": [_round(1)]}
    result["peers"]["edgeprompt-int8"] = {"title": "eight", "rounds": [_round(3)]}
    _kl(tmp_path, newest={PEER: 0.01, "gguf": 0.015, "int8": 0.016})
    kl = divergences("tiny", tmp_path)
    assert [group_of(name, kl) for name in ("llamacpp", "edgeprompt", "edgeprompt-int8", "other", "pytorch")] == [
        FAITHFUL, FAITHFUL, FAST, UNKNOWN, FAITHFUL,
    ]  # fmt: skip
    first = [line.split(" | ")[0] for line in to_markdown(result, kl=kl).splitlines() if line.startswith("| ")]
    assert [name.strip("| *") for name in first] == [
        "", "---", "faithful", "ours", "llama", "fast", "eight", "KL not measured", "other", "gone",
    ]  # fmt: skip
    rows = to_markdown(result, kl=kl).splitlines()
    assert len({line.count("|") for line in rows if line.startswith("|")}) == 1
    assert "| ours | 0.015 |" in to_markdown(result, kl=kl)
    assert "eight (fast, KL 0.016)" in ratios_to_markdown(result, kl)


def test_an_earlier_run_fills_up_what_was_not_measured_again(tmp_path: Path) -> None:
    _kl(tmp_path, newest={PEER: 0.01, "gguf": 0.02}, earlier={PEER: 0.04, "gguf": 0.03, "int8": 0.05})
    kl = divergences("tiny", tmp_path)
    # Each figure is held against llama.cpp's of its own run.
    assert (kl["gguf"].mean, group_of("edgeprompt", kl)) == (0.02, FAST)
    assert (kl["int8"].earlier, group_of("edgeprompt-int8", kl)) == (True, FAITHFUL)
    assert divergences("unknown", tmp_path) == {}
