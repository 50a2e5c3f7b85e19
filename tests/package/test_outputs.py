"""Nothing is replaced that is not ours, and never a source."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeprompt.errors import InputError, OutputError
from edgeprompt.package.files import atomic_file, atomic_folder, write_atomic
from edgeprompt.package.outputs import (
    ADAPTER,
    CHECKPOINT,
    JOURNAL,
    LOG,
    METRICS,
    ONNX_ADAPTER,
    PACKAGE,
    PROMPT,
    PROMPT_SET,
    REPORT,
    RUN_ANSWERS,
    RUN_PARQUET,
    TABLE,
    TEXT,
    check_output,
)


def make_package(folder):
    folder.mkdir(parents=True)
    graphs = {"model": {"file": "model.onnx", "sha256": "", "data": {"model.onnx.data": ""}}}
    manifest = {"format": "edgeprompt-package", "graphs": graphs, "prompts": ["prompts/a.safetensors"]}
    (folder / "edgeprompt.json").write_text(json.dumps(manifest))
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "prompts").mkdir()
    (folder / "prompts" / "a.safetensors").write_bytes(b"rows")
    return folder


def make_adapter(folder, mark=True, **config):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", **config}))
    metadata = {"format": "pt", **({"written_by": "edgeprompt"} if mark else {})}
    save_file({"x": np.zeros(1)}, folder / "adapter_model.safetensors", metadata=metadata)
    return folder


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replace(path, kind, **more):
    with atomic_folder(path, kind, force=True, **more) as temporary:
        (temporary / "new").write_text("new")


@pytest.mark.parametrize(("make", "kind"), [(make_package, PACKAGE), (make_adapter, ADAPTER)])
def test_an_older_one_and_an_empty_folder_are_replaced(tmp_path, make, kind):
    for target in (make(tmp_path / "old"), tmp_path / "empty", tmp_path / "deep" / "fresh"):
        target.mkdir(exist_ok=True) if target.name == "empty" else None
        replace(target, kind)
        assert os.listdir(target) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty", "old"]


def foreign(folder, what):
    """A folder that must never be replaced."""
    if what == "notes":
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    elif what == "package with a note":
        (make_package(folder) / "notes.md").write_text("mine")
    elif what == "package with a prompt of the user":
        (make_package(folder) / "prompts" / "tuned.safetensors").write_bytes(b"mine")
    elif what == "package in a checkout":
        (make_package(folder) / ".git").mkdir()
    elif what == "package with a link":
        (make_package(folder) / "more").symlink_to(folder.parent)
    elif what == "another tool's manifest":
        folder.mkdir()
        (folder / "edgeprompt.json").write_text('{"format": "else", "graphs": {}}')
    elif what == "broken manifest":
        folder.mkdir()
        (folder / "edgeprompt.json").write_text("[" * 100)
    elif what == "deep manifest":
        folder.mkdir()
        (folder / "edgeprompt.json").write_text("[" * 100_000)
        (folder / "adapter_config.json").write_text("[" * 100_000)
    elif what == "somebody's LoRA":
        make_adapter(folder, mark=False, lora_alpha=8)
    elif what == "adapter with a note":
        (make_adapter(folder) / "notes.md").write_text("mine")
    return folder


@pytest.mark.parametrize("kind", [PACKAGE, ADAPTER], ids=["package", "adapter"])
@pytest.mark.parametrize(
    "what",
    [
        "notes", "package with a note", "package with a prompt of the user", "package in a checkout",
        "package with a link", "another tool's manifest", "broken manifest", "deep manifest", "somebody's LoRA",
        "adapter with a note",
    ],
)  # fmt: skip
def test_a_folder_of_somebody_else_is_kept(tmp_path, what, kind):
    target = foreign(tmp_path / "target", what)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="replaced"):
        replace(target, kind)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["target"]


def test_an_adapter_of_an_older_version_is_known(tmp_path):
    assert check_output(make_adapter(tmp_path / "old", mark=False, num_layers=2), ADAPTER, force=True)


def test_the_working_directory_and_the_home_folder_are_kept(tmp_path, monkeypatch):
    place = make_package(tmp_path / "outer") / "inner"
    place.mkdir()
    monkeypatch.chdir(place)
    for target in (".", "..", place, tmp_path / "outer", "/"):
        for force in (False, True):
            with pytest.raises(InputError, match="the working directory"):
                check_output(target, PACKAGE, force=force)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(place))
    for target in (place, tmp_path / "outer"):
        with pytest.raises(InputError, match="the home folder"):
            check_output(target, PACKAGE, force=True)


@pytest.mark.parametrize("via", ["itself", "link", "link to it", "parent", "dots"])
def test_a_source_is_never_replaced(tmp_path, via):
    source = make_package(tmp_path / "a" / "source")
    link = tmp_path / "link"
    link.symlink_to(source)
    given, target = {
        "itself": (source, source),
        "link": (source, link),
        "link to it": (link, source),
        "parent": (source / "prompts" / "a.safetensors", source),
        "dots": (source, tmp_path / "a" / "x" / ".." / "source"),
    }[via]
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"which the command reads|also what the command reads"):
        replace(target, PACKAGE, sources=(str(given),))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("via", ["itself", "symbolic link", "hard link", "link above"])
def test_a_source_file_is_never_replaced(tmp_path, via):
    (tmp_path / "data").mkdir()
    source = tmp_path / "data" / "in.txt"
    source.write_text("x")
    target = tmp_path / "out.txt"
    if via == "symbolic link":
        target.symlink_to(source)
    elif via == "hard link":
        target.hardlink_to(source)
    elif via == "link above":
        (tmp_path / "above").symlink_to(tmp_path / "data")
        target = tmp_path / "above" / "in.txt"
    else:
        target = source
    with pytest.raises(InputError, match="also what the command reads"), atomic_file(target, TEXT, sources=(source,)):
        pass
    assert source.read_text() == "x"
    with pytest.raises(InputError, match="is a file of"):
        check_output(source, TEXT, sources=(tmp_path / "data",))


def test_a_hub_id_or_rows_are_no_path(tmp_path):
    sources = ("org/model", "x" * 5000, None, [{"text": "a"}], tmp_path / "missing")
    assert check_output(tmp_path / "out", PACKAGE, sources=sources) == tmp_path / "out"


@pytest.mark.parametrize("kind", [PROMPT, ONNX_ADAPTER, TABLE, CHECKPOINT, METRICS, TEXT], ids=lambda kind: kind.name)
def test_only_a_file_of_the_kind_is_replaced(tmp_path, kind):
    other = tmp_path / "file"
    save_file({"x": np.zeros(1)}, other)
    before = other.read_bytes()
    with pytest.raises(InputError, match="is not replaced"), atomic_file(other, kind) as temporary:
        temporary.write_bytes(b"new")
    assert other.read_bytes() == before
    other.write_bytes(b"")
    with atomic_file(other, kind) as temporary:
        temporary.write_bytes(b"new")
    assert other.read_bytes() == b"new"


def test_a_file_where_a_folder_belongs_and_the_reverse(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for kind in (PACKAGE, PROMPT_SET, LOG):
        with pytest.raises(InputError, match=r"is a file; a .* is a folder"):
            check_output(tmp_path / "file", kind, force=True)
    with pytest.raises(InputError, match=r"is a folder; a .* is a file"):
        check_output(tmp_path / "folder", TEXT)
    with pytest.raises(InputError, match="is a file; give another path"):
        check_output(tmp_path / "file" / "out", TEXT)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(InputError, match="no regular file"):
            check_output(path, TEXT)


def test_what_is_read_only_is_kept(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(InputError, match="read-only"):
        check_output(tmp_path / "file", TEXT)
    folder = make_package(tmp_path / "package")
    folder.chmod(0o555)
    with pytest.raises(InputError, match="read-only"):
        check_output(folder, PACKAGE, force=True)
    folder.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_told_before_the_work(tmp_path):
    (tmp_path / "place").mkdir(mode=0o555)
    for kind in (PACKAGE, TEXT):
        with pytest.raises(InputError, match="is read-only"):
            check_output(tmp_path / "place" / "out", kind)


def test_what_came_to_lie_there_during_the_work_is_kept(tmp_path):
    with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / "out", PACKAGE):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(InputError, match="not replaced"), atomic_file(tmp_path / "file", PROMPT):
        (tmp_path / "file").write_text("mine")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link", TEXT) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_folders_made_for_an_output_that_fails_go_again(tmp_path):
    def fail():
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b" / "out", PACKAGE):
        fail()
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a" / "out", TEXT):
        fail()
    assert not list(tmp_path.iterdir())


OURS = {
    "answers.jsonl": (RUN_ANSWERS, b'{"input": "a", "prompt": null, "text": "b"}\n'),
    "answers.csv": (RUN_ANSWERS, b"id,prompt,answer,score\n1,,b,\n"),
    "answers.tsv": (RUN_ANSWERS, b"prompt\tanswer\tscore\terror\n"),
    "report.md": (REPORT, b"# edgeprompt bench: SmolLM2 (int4)\n"),
    "report.csv": (REPORT, b"test_time,cpu_info,edgeprompt_version\n2026,x,0.1.0\n"),
    "journal": (JOURNAL, b'{"records": 1, "bytes": 2, "header": null, "settings": ""}'),
}
FOREIGN = {
    "notes.txt": (RUN_ANSWERS, b"my notes\n"),
    "notes.jsonl": (RUN_ANSWERS, b'{"text": "a"}\n'),
    "data.csv": (RUN_ANSWERS, b"text,label\na,b\n"),
    "list.json": (RUN_ANSWERS, b"[1, 2]\n"),
    "notes.md": (REPORT, b"# My notes\n"),
    "numbers.npy": (TABLE, b"\x93NUMPY\x01\x00rest"),
    "a.onnx_adapter": (ONNX_ADAPTER, b"abcdTORTrest"),
    "data.parquet": (RUN_PARQUET, b"PAR1text\x04\x00\x00\x00PAR1"),
}


@pytest.mark.parametrize("name", OURS)
def test_what_a_command_wrote_is_replaced(tmp_path, name):
    kind, data = OURS[name]
    (tmp_path / name).write_bytes(data)
    write_atomic(tmp_path / name, b"new", kind)
    assert (tmp_path / name).read_bytes() == b"new"


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_could_be_anybodys_needs_force(tmp_path, name):
    """Before, every text, every .npy and every parquet file was replaced without a word."""
    kind, data = FOREIGN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match="give --force"):
        write_atomic(tmp_path / name, b"new", kind)
    assert (tmp_path / name).read_bytes() == data
    write_atomic(tmp_path / name, b"new", kind, force=True)
    assert (tmp_path / name).read_bytes() == b"new"


OTHERS = (RUN_ANSWERS, RUN_PARQUET, REPORT, TABLE, ONNX_ADAPTER, JOURNAL)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda k: k.name)
def test_another_kind_of_file_is_not_even_replaced_by_force(tmp_path, kind):
    (tmp_path / "photo").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(InputError, match="is not replaced"):
        write_atomic(tmp_path / "photo", b"new", kind, force=True)
    assert (tmp_path / "photo").read_bytes() == b"\x89PNG\0\0"


def test_a_parquet_file_of_run_is_told_by_its_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for columns, ours in ((("id", "prompt", "answer", "score"), True), (("id", "text"), False)):
        path = tmp_path / f"{ours}.parquet"
        parquet.write_table(pyarrow.table({name: ["x"] for name in columns}), path)
        if ours:
            check_output(path, RUN_PARQUET)
        else:
            with pytest.raises(InputError, match="give --force"):
                check_output(path, RUN_PARQUET)


@pytest.mark.parametrize("write", ["file", "folder", "bytes", "check"])
@pytest.mark.parametrize("place", ["long name", "long folder", "NUL", "refused"])
def test_a_place_that_cannot_be_is_one_line(tmp_path, monkeypatch, write, place):
    """As `/proc/none`, a name that the file system does not hold, a folder that may not be made."""
    path = (
        tmp_path / {"long name": "x" * 300, "long folder": f"{'x' * 300}/y", "NUL": "a\0b", "refused": "none/y"}[place]
    )
    if place == "refused":
        monkeypatch.setattr("pathlib.Path.mkdir", lambda self, *_, **__: os.mkdir("/proc/none/none"))
        if write == "check":
            return  # nothing tells before it is tried
    with pytest.raises(InputError) as found:
        if write == "file":
            with atomic_file(path, PROMPT):
                raise AssertionError
        elif write == "folder":
            with atomic_folder(path, PACKAGE):
                raise AssertionError
        elif write == "bytes":
            write_atomic(path, b"", PROMPT)
        elif place == "long folder":
            with atomic_file(path, PROMPT):
                raise AssertionError
        else:
            check_output(path, PROMPT)
    assert str(found.value).startswith(f"output {str(path)!r} ")
    assert "; give another " in str(found.value)
    if place != "NUL":
        assert isinstance(found.value, OutputError)
        assert found.value.strerror
    assert os.listdir(tmp_path) == []
