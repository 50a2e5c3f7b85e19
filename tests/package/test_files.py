"""Files and folders that appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprompt.errors import InputError
from edgeprompt.package import files
from edgeprompt.package.files import (
    atomic_file,
    atomic_folder,
    check_regular,
    fingerprint_tokenizer,
    read_regular,
    sha256_file,
    write_atomic,
)
from edgeprompt.package.outputs import PACKAGE, PACKED_GRAPH, TEXT
from tests.support.files import IRREGULAR, make_irregular


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one", TEXT)
    write_atomic(path, b"two", TEXT)
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def fail_in(manager):
    with pytest.raises(RuntimeError, match="midway"), manager as temporary:
        (temporary / "x" if temporary.is_dir() else temporary).write_bytes(b"half")
        raise RuntimeError("midway")


def test_a_failure_leaves_nothing(tmp_path):
    fail_in(atomic_file(tmp_path / "file", TEXT))
    fail_in(atomic_folder(tmp_path / "folder", PACKED_GRAPH))
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_without_force(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "sizes.json").write_text("x")
    with pytest.raises(InputError, match="--force"), atomic_folder(target, PACKED_GRAPH):
        pass
    fail_in(atomic_folder(target, PACKED_GRAPH, force=True))
    assert (target / "sizes.json").read_text() == "x"
    with atomic_folder(target, PACKED_GRAPH, force=True) as temporary:
        (temporary / "new").write_text("y")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, kind):
    what = "TEXT" if kind == "file" else "PACKAGE"
    code = (
        f"import sys; from edgeprompt.package.files import atomic_{kind}; from edgeprompt.package import outputs\n"
        f"with atomic_{kind}(sys.argv[1], outputs.{what}): print('inside', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (alive,) = tmp_path.iterdir()
        if kind == "file":
            write_atomic(tmp_path / "out", b"other", TEXT)  # beside one that still runs
            assert alive.exists()
            (tmp_path / "out").unlink()
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == [alive.name]
    if kind == "file":
        write_atomic(tmp_path / "out", b"whole", TEXT)
    else:
        with atomic_folder(tmp_path / "out", PACKAGE):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizers_fingerprint_is_of_what_it_does():
    def fingerprint(merges, **more):
        return fingerprint_tokenizer(json.dumps({"model": {"vocab": {"a": 0}, "merges": merges}, **more}).encode())

    pairs = fingerprint([["a", "b"], ["ab", "c"]])
    assert fingerprint(["a b", "ab c"], padding={"length": 3}, version="1.0") == pairs
    assert fingerprint(["a b", "a bc"]) != pairs
    assert fingerprint(["ab c", "a b"]) != pairs


@pytest.mark.skipif(os.name == "nt", reason="pipes and sockets with a path")
@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = make_irregular(kind, tmp_path / "x")
    for read in (lambda: read_regular(path, 100), lambda: check_regular(path, 100), lambda: sha256_file(path)):
        with pytest.raises(OSError, match=f"it is {kind}, and only regular files are read"):
            read()


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes; at most 4 are allowed"):
        read_regular(path, 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "no", 5)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="a file of Linux that has no size and no end")
def test_a_file_that_holds_more_than_its_size_is_refused() -> None:
    for path in ("/proc/self/pagemap", "/proc/cpuinfo"):
        with pytest.raises(OSError, match="more than the 0 bytes"):
            read_regular(path, 1 << 30)


def test_what_is_swapped_between_the_look_and_the_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is looked at again once it is open: a pipe that took its place is neither waited for nor read."""
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    opening = os.open

    def swap(*arguments: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return opening(*arguments)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(OSError, match="it is a pipe"):
        read_regular(path, 5)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_signal_while_an_old_folder_is_replaced_keeps_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # a file system that cannot
    target = tmp_path / "package"
    for version in ("old", "new"):
        calls: list[Path] = []
        real = Path.replace

        def replace(self: Path, to: Any, *, calls: list[Path] = calls, real: Any = real, version: str = version) -> Any:
            found = real(self, to)
            calls.append(self)
            if version == "new" and len(calls) == moment:
                raise SystemExit(143)
            return found

        monkeypatch.setattr(Path, "replace", replace)
        try:
            with atomic_folder(target, PACKED_GRAPH, force=True) as folder:
                (folder / "sizes.json").write_text(version)
        except SystemExit:
            assert version == "new"
        monkeypatch.setattr(Path, "replace", real)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert (target / "sizes.json").read_text() == ("old" if moment == 1 else "new")


_KILLED = """
import os, signal, sys
from pathlib import Path
from edgeprompt.package.files import atomic_folder
from edgeprompt.package.outputs import PACKED_GRAPH

target, number, moment = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
seen = 0


def stop(event, arguments):
    global seen
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.chmod", "tempfile.mkdtemp"):
        if any(str(target.parent) in str(one) for one in arguments):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), number)


def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(143)


signal.signal(signal.SIGTERM, leave)
sys.addaudithook(stop)
with atomic_folder(target, PACKED_GRAPH, force=True) as folder:
    (folder / "sizes.json").write_text("new")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="exchanges two folders in one step")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_folder_is_whole_at_every_moment(tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "deep" / "package"
    for moment in range(1, 30):
        target.mkdir(parents=True, exist_ok=True)
        (target / "sizes.json").write_text("old")
        command = [sys.executable, "-c", _KILLED, str(target), str(int(number)), str(moment)]
        code = subprocess.run(command, check=False).returncode
        assert (target / "sizes.json").read_text() in ("old", "new")
        if number == signal.SIGTERM:
            assert [path.name for path in target.parent.iterdir()] == ["package"]
        if code == 0:
            break
    assert 3 < moment < 29
    assert [path.name for path in target.parent.iterdir()] == ["package"]
