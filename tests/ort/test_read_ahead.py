from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgeprompt.ort import read_ahead as module
from edgeprompt.ort.read_ahead import read_ahead

SIZE = 8 << 20
LINUX = sys.platform == "linux"


def in_memory(path: Path, position: int) -> bool:
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
    return True


def on_disk(path: Path, content: bytes) -> Path:
    """Write a file and have the system forget it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.mark.skipif(not LINUX, reason="only Linux tells what is in memory")
def test_files_are_in_memory_afterwards(tmp_path: Path) -> None:
    files = [on_disk(tmp_path / name, os.urandom(SIZE)) for name in ("first", "second")]
    try:
        there = [in_memory(file, at) for file in files for at in (0, SIZE - 1)]
    except OSError as error:
        pytest.skip(f"the file system does not tell what is in memory: {error}")
    if any(there):
        pytest.skip("the system keeps these files in memory whatever it is told")
    thread = read_ahead(files)
    assert thread is not None
    thread.join(30)
    assert all(in_memory(file, at) for file in files for at in range(0, SIZE, 4096))


@pytest.mark.skipif(not LINUX, reason="it does nothing elsewhere")
def test_files_that_fill_the_memory_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = on_disk(tmp_path / "file", b"a" * SIZE)
    monkeypatch.setattr(module, "SHARE", 1 << 40)
    assert read_ahead([file]) is None


def test_what_cannot_be_read_is_somebody_elses_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert read_ahead([tmp_path / "missing"]) is None
    thread = read_ahead([tmp_path])
    if thread is not None:
        thread.join(30)
        assert not thread.is_alive()
    assert capfd.readouterr().err == ""
