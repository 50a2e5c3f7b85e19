"""Files and folders that appear whole or not at all."""

import pytest

from edgeprompt.errors import InputError
from edgeprompt.files import atomic_file, atomic_folder, sha256_file, write_atomic


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def fail_in(manager):
    with pytest.raises(RuntimeError, match="midway"), manager as temporary:
        (temporary / "x" if temporary.is_dir() else temporary).write_bytes(b"half")
        raise RuntimeError("midway")


def test_a_failure_leaves_nothing(tmp_path):
    fail_in(atomic_file(tmp_path / "file"))
    fail_in(atomic_folder(tmp_path / "folder"))
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_without_force(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(InputError, match="--force"), atomic_folder(target):
        pass
    fail_in(atomic_folder(target, force=True))
    assert (target / "mine").read_text() == "x"
    with atomic_folder(target, force=True) as temporary:
        (temporary / "new").write_text("y")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
