import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeprompt.bench import device, energy
from edgeprompt.bench.memory import PeakSplit, peak_rss, split_rss

MB = 1 << 20


def test_device_names_processor_and_versions():
    found = device.describe_device()
    assert found["cpu"]
    assert 1 <= found["cores_usable"] <= found["cores"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["memory_bytes"] > 256 * MB


def test_throttling_is_more_than_a_tenth():
    fast, slow = {"mhz": 1.0, "fixed_work_ns": 100}, {"mhz": 1.0, "fixed_work_ns": 111}
    assert device.throttling(fast, slow)["seen"]
    assert not device.throttling(slow, fast)["seen"]


@pytest.mark.skipif(not split_rss(), reason="only Linux tells anonymous and file-backed memory apart")
def test_peak_split_sees_anonymous_and_mapped_memory(tmp_path: Path):
    file = tmp_path / "data"
    file.write_bytes(b"x" * (40 * MB))
    before = split_rss()
    with PeakSplit() as split, file.open("rb") as data:
        held = np.ones(128 * MB, np.uint8)  # more than malloc keeps in reserve for reuse
        with mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            touched = sum(mapped[:: mmap.PAGESIZE])
            for _ in range(3):
                subprocess.run([sys.executable, "-c", ""], check=True)  # time for the watcher
    assert touched
    assert split.peak["anonymous"] - before["anonymous"] >= 0.9 * held.nbytes
    assert split.peak["file"] - before["file"] >= 36 * MB
    assert peak_rss() >= split.peak["anonymous"]


def _counter(folder: Path, name: str, microjoules: int) -> Path:
    home = folder / name
    home.mkdir()
    (home / "energy_uj").write_text(f"{microjoules}\n")
    (home / "max_energy_range_uj").write_text("1000000000\n")
    return home / "energy_uj"


def test_rapl_adds_packages_and_wraps_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = _counter(tmp_path, "intel-rapl:0", 999_000_000), _counter(tmp_path, "intel-rapl:1", 5_000_000)
    _counter(tmp_path, "intel-rapl:0:0", 1)  # a part of package 0, counted there already
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    meter = energy.EnergyMeter("cpu")
    before = meter.read()
    first.write_text("2000000\n")
    second.write_text("9000000\n")
    assert meter.source == "RAPL"
    assert meter.since(before) == pytest.approx(3.0 + 4.0)


def test_no_counter_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    meter = energy.EnergyMeter("cpu")
    assert meter.source is None
    assert meter.since(meter.read()) is None
