"""The table of starts, from known seconds, and what leaves the page cache."""

from pathlib import Path

from benchmarks.peers.starts import OURS, STATES, drop_from_memory, to_markdown


def test_ratios_are_to_ours_and_absent_peers_are_said():
    memory, disk = STATES
    seconds = {
        OURS: {memory: [0.25, 0.5, 0.5], disk: [1.0, 1.0, 1.0]},
        "other": {memory: [0.5, 1.0, 1.0], disk: [0.5, 0.5, 0.5]},
        "gone": {"absent": "no wheel"},
    }
    machine = {"day": "a day", "cpu": "a processor", "isa": ["AVX2"], "cores": 2, "versions": {"onnxruntime": "1"}}
    lines = to_markdown({"machine": machine, "seconds": seconds}).splitlines()
    other = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert other == ["other", "1", "2.00 (1.00 to 4.00)", "0.5", "0.50 (0.50 to 0.50)"]
    assert lines[4].startswith("| gone | absent |")
    assert "3 starts each" in lines[-1]


def test_dropped_files_are_whole(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"as it was")
    drop_from_memory([tmp_path, tmp_path / "deep" / "file", tmp_path / "nothing"])
    assert (tmp_path / "deep" / "file").read_bytes() == b"as it was"
