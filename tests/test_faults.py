"""What a device does to a runtime: full disks, files cut short or swapped, budgets that are too small."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt import CapacityError, PackageError, Request
from edgeprompt.ort.prefix_store import PrefixStore, facts_of
from edgeprompt.package.files import sha256_file
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import TunedFor, save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET


@pytest.fixture
def package(tiny_llama_package: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(tiny_llama_package, tmp_path / "package"))


@pytest.mark.parametrize("name", ["edgeprompt.json", "model.onnx", "model.onnx.data", "tokenizer.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_package_is_refused(package: Path, name: str, share: float) -> None:
    data = (package / name).read_bytes()
    (package / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(PackageError, match=name.removesuffix(".data").split(".")[0]):
        edgeprompt.load(package, options=QUIET)


def test_another_graph_is_refused(package: Path) -> None:
    graph = package / "model.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data.replace(b"model.layers.1", b"model.layers.9"))
    with pytest.raises(PackageError, match=r"model\.onnx has SHA-256 .* the manifest names"):
        edgeprompt.load(package, options=QUIET)


def test_a_manifest_of_another_size_is_refused(package: Path) -> None:
    file = package / "edgeprompt.json"
    good = json.loads(file.read_text("utf-8"))
    for name, value in (("num_layers", 3), ("num_layers", 1), ("num_key_value_heads", 4), ("head_size", 8)):
        file.write_text(json.dumps({**good, "geometry": {**good["geometry"], name: value}}), "utf-8")
        with pytest.raises(PackageError, match=name):
            edgeprompt.load(package, options=QUIET)


def test_a_package_replaced_under_a_running_process(package: Path) -> None:
    with edgeprompt.load(package, options=QUIET) as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "p"))
        before = runtime.generate("the film", prompt="p", max_new_tokens=20).token_ids
        other = Path(shutil.copytree(package, package.with_name("other")))
        data = bytearray((other / "model.onnx.data").read_bytes())
        weights = np.frombuffer(data, np.float32).copy()
        (other / "model.onnx.data").write_bytes((weights * 1.5).astype(np.float32).tobytes())
        package.replace(package.with_name("old"))
        other.replace(package)
        shutil.rmtree(package.with_name("old"))
        assert runtime.generate("the film", prompt="p", max_new_tokens=20).token_ids == before
    manifest = Manifest.from_json((package / "edgeprompt.json").read_bytes())
    assert manifest.graphs["model"].data["model.onnx.data"] != sha256_file(package / "model.onnx.data")
    with pytest.raises(PackageError, match=r"model\.onnx\.data has SHA-256"):
        edgeprompt.package.folder.open_package(package).verify()


def test_a_full_disk_leaves_nothing_and_serving_goes_on(tiny_llama_package: Path, tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
import edgeprompt
from edgeprompt import EngineOptions, PromptFileError, save_prompt
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET

package, folder = map(Path, sys.argv[1:])
options = EngineOptions(provider="cpu", threads=1, spinning=False, cache_folder=folder / "cache")
with edgeprompt.load(package, options=options) as runtime:
    prompt = make_prompt(runtime.manifest, "p", count=50)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write beyond that fails as on a full disk
    try:
        save_prompt(prompt, folder / "p.safetensors")
    except PromptFileError as error:
        print(error)
    runtime.add_prompt(prompt)
    print(runtime.generate("the film", prompt="p", max_new_tokens=3).finish_reason)
print([path.name for path in folder.rglob("*") if path.suffix in (".safetensors", ".partial")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama_package), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved, reason, left = done.stdout.splitlines()
    assert saved.startswith("cannot write prompt file")
    assert reason == "length"
    assert left == "[]"
    assert "cannot keep a prefix" in done.stderr


def test_prefixes_of_another_origin_are_not_found(tmp_path: Path) -> None:
    bound = {"weights_hash": "w", "provider": "cpu", "dtype": "float32", "ort_version": "1"}
    prefix = np.ones((4, 2, 3, 8), np.float32)
    store = PrefixStore(tmp_path, facts_of(**bound))
    store.write("prompt", prefix)
    found = store.read("prompt", prefix.shape)
    assert found is not None
    assert (found == prefix).all()
    for name, value in (("weights_hash", "x"), ("provider", "cuda"), ("dtype", "float16"), ("ort_version", "2")):
        other = PrefixStore(tmp_path, facts_of(**{**bound, name: value}))
        assert other.read("prompt", prefix.shape) is None
        other.path("prompt").write_bytes(store.path("prompt").read_bytes())  # renamed by hand: still refused
        assert other.read("prompt", prefix.shape) is None
    assert store.read("other", prefix.shape) is None
    assert store.read("prompt", (4, 2, 5, 8)) is None


@pytest.mark.parametrize("how", ["a folder", "a folder that holds something", "a link to itself", "refused"])
def test_a_prefix_that_cannot_be_kept_is_a_warning(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bound = {"weights_hash": "w", "provider": "cpu", "dtype": "float32", "ort_version": "1"}
    store = PrefixStore(tmp_path / "cache", facts_of(**bound))
    place = store.path("prompt")
    place.parent.mkdir()
    if how.startswith("a folder"):
        place.mkdir()
        if "holds" in how:
            (place / "notes.txt").write_text("mine")
    elif how == "a link to itself":
        place.symlink_to(place)
    else:
        # A foreign file that comes between the unlink and the write.
        monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        place.write_text("mine")
    store.write("prompt", np.ones((4, 2, 3, 8), np.float32))
    if how == "a link to itself":
        assert store.read("prompt", (4, 2, 3, 8)) is not None
        return
    assert "cannot keep a prefix" in caplog.text
    assert store.read("prompt", (4, 2, 3, 8)) is None
    assert place.read_text() == "mine" if how == "refused" else place.is_dir()


def test_prompts_beyond_every_budget(tiny_llama_package: Path) -> None:
    options = dataclasses.replace(QUIET, prefix_budget=0, kv_budget=256 * 2 * 2 * 2 * 16 * 4)
    with edgeprompt.load(tiny_llama_package, options=options) as runtime:
        for number in range(20):
            runtime.add_prompt(make_prompt(runtime.manifest, f"p{number}", count=150, seed=number))
        requests = [Request("the film", f"p{number}") for number in range(20)]
        first = [result.token_ids for result in runtime.run(requests)]
        assert [result.token_ids for result in runtime.run(requests)] == first
    tight = dataclasses.replace(options, kv_budget=1000)
    with edgeprompt.load(tiny_llama_package, options=tight) as runtime, pytest.raises(CapacityError, match="kv_budget"):
        runtime.add_prompt(make_prompt(runtime.manifest, "large", count=150))
        runtime.generate("the film", prompt="large")


def test_other_weights_than_the_prompts_are_said(tiny_llama_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime, caplog.at_level(logging.INFO, "edgeprompt"):
        same = TunedFor("fp32", runtime.manifest.weights_hash)
        for tuned in (None, TunedFor("fp32"), same):
            runtime.add_prompt(make_prompt(runtime.manifest, "p", tuned_for=tuned))
        assert not caplog.records
        for tuned in (TunedFor("int4"), TunedFor("fp32", "sha256:1")):
            runtime.add_prompt(make_prompt(runtime.manifest, "p", tuned_for=tuned))
        assert len(caplog.records) == 2


def test_a_store_that_is_written_while_it_is_read(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        prompts = [make_prompt(runtime.manifest, "any", seed=seed) for seed in range(3)]
        save_prompt(prompts[0], tmp_path / "task.safetensors")
        runtime.add_folder(tmp_path)
        allowed = []
        for prompt in prompts:
            runtime.add_prompt(prompt, name="direct")
            allowed.append(runtime.generate("the film", prompt="direct", max_new_tokens=8).token_ids)
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.wait(0.002):
                number += 1
                save_prompt(prompts[number % 3], tmp_path / "task.safetensors")

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(60):
                assert runtime.generate("the film", prompt="task", max_new_tokens=8).token_ids in allowed
        finally:
            stop.set()
            writer.join()
