"""Files put into, replaced in and taken out of a served folder of prompts, while clients ask for them."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

import edgeprompt
from edgeprompt import PromptFile, Runtime
from edgeprompt.package.manifest import Base
from edgeprompt.prompts import registry
from edgeprompt.prompts.file import TunedFor, save_prompt
from edgeprompt.prompts.weights import TUNED_QUALITY
from tests.support.encoder_prompts import with_head
from tests.support.prompts import make_prompt
from tests.support.runtimes import QUIET
from tests.support.server import serving

SECONDS = 4.0
VERSIONS = 4
CLIENTS = 6
TEXT = "the film was good"


def version(runtime: Runtime, name: str, number: int) -> PromptFile:
    """A prompt whose labels say which one it is; all versions of a name have files of one size."""
    labels = [f"{name} {number} {end}" for end in "xy"]
    seed = 10 * ord(name) + number
    if runtime.manifest.architecture == "encoder-only":
        method = "p-tuning-v2" if name == "b" else "prompt-tuning"
        return with_head(runtime, name, 2, "mean", labels=tuple(labels), seed=seed, method=method)
    words = dict(zip(labels, [(" good",), (" bad",)], strict=True))
    return make_prompt(runtime.manifest, name, verbalizer=words, seed=seed)


class Folder:
    """What was done to the files of a folder, and when."""

    def __init__(self, folder: Path, made: dict[tuple[str, int], bytes]) -> None:
        self.folder, self.made = folder, made
        self.there: dict[str, list[tuple[float, float, int]]] = {name: [] for name, _ in made}
        """Versions of each name: when each began to be written, and was whole."""
        self.stop = threading.Event()

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def change(self, rng: random.Random) -> None:
        """Replace, write in place, cut and complete, or remove and put back."""
        while not self.stop.is_set():
            for name in self.there:
                number = rng.randrange(VERSIONS)
                data, path, began = self.made[name, number], self.path(name), time.monotonic()
                how = rng.choice(["rename", "halves", "remove", "kept time"]) if name == "b" else "rename"
                self.there[name].append((began, float("inf"), number))
                if how == "rename":
                    other = self.folder / f".{name}.tmp"
                    other.write_bytes(data)
                    os.replace(other, path)
                elif how == "halves":
                    with path.open("wb") as file:
                        file.write(data[: len(data) // 2])
                        file.flush()
                        time.sleep(rng.random() / 20)
                        file.write(data[len(data) // 2 :])
                elif how == "remove":
                    path.unlink(missing_ok=True)
                    time.sleep(rng.random() / 20)
                    path.write_bytes(data)
                else:  # as `rsync -t` or `cp -p` of files of one time
                    path.unlink(missing_ok=True)
                    path.write_bytes(data)
                    os.utime(path, ns=(10**18, 10**18))
                self.there[name][-1] = (began, time.monotonic(), number)
                time.sleep(rng.random() / 10)

    def versions(self, name: str, start: float, end: float) -> set[int]:
        """Versions that the file was of, whole or in part, at some time between the two."""
        events = [*self.there[name]]
        ends = [*(done for _, done, _ in events[1:]), end]
        return {number for (began, _, number), last in zip(events, ends, strict=True) if began <= end and last >= start}


@pytest.fixture(params=["decoder", "encoder", "seq2seq"])
def package(request: pytest.FixtureRequest) -> Path:
    if request.param == "decoder":
        return request.getfixturevalue("tiny_llama_package")  # type: ignore[no-any-return]
    kind = "BERT" if request.param == "encoder" else "T5"
    return request.getfixturevalue(f"{request.param}_package")(kind)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "read again"])
def test_prompts_that_are_dropped_and_replaced_while_clients_ask(package: Path, tmp_path: Path, kept: bool) -> None:
    options = QUIET if kept else dataclasses.replace(QUIET, prefix_budget=0)
    with edgeprompt.load(package, options=options) as runtime:
        made, expected = {}, {}
        for name in "ab":
            for number in range(VERSIONS):
                prompt = version(runtime, name, number)
                made[name, number] = prompt.to_bytes()
                runtime.add_prompt(prompt, name="check")
                expected[name, number] = dict(runtime.classify(TEXT, prompt="check").scores)
        runtime.remove_prompt("check")
        runtime.add_folder(tmp_path)
        folder = Folder(tmp_path, made)
        with serving(runtime) as running:
            wrong: list[str] = []
            told: Counter[int] = Counter()
            limits = httpx.Limits(max_connections=CLIENTS)
            folder.path("a").write_bytes(made["a", 0])
            folder.there["a"].append((0.0, 0.0, 0))

            def ask(client: httpx.Client, seed: int) -> None:
                rng = random.Random(seed)
                while not folder.stop.is_set():
                    name, start = rng.choice("ab"), time.monotonic()
                    answer = client.post("/v1/classify", json={"model": name, "input": [TEXT, TEXT]})
                    told[answer.status_code] += 1
                    if answer.status_code == 404 and name == "b":  # "a" is there all the time
                        continue
                    if answer.status_code != 200:
                        wrong.append(f"{answer.status_code} {answer.text}")
                        continue
                    for one in answer.json()["data"]:
                        number = int(one["label"].split()[1])
                        if one["scores"] != pytest.approx(expected[name, number], abs=1e-5):
                            wrong.append(f"scores of {one['label']}")
                        if number not in folder.versions(name, start, time.monotonic()):
                            wrong.append(f"{one['label']} is of another time")

            with httpx.Client(base_url=running.url, timeout=60, limits=limits) as client:
                threads = [threading.Thread(target=ask, args=(client, seed)) for seed in range(CLIENTS)]
                for thread in threads:
                    thread.start()
                timer = threading.Timer(SECONDS, folder.stop.set)
                timer.start()
                folder.change(random.Random(0))
                for thread in threads:
                    thread.join(60)
                    assert not thread.is_alive()
            for name in "ab":  # what is whole is served at once
                answer = running.post("/v1/classify", {"model": name, "input": TEXT}).json()
                assert answer["data"][0]["label"].split()[:2] == [name, str(folder.there[name][-1][2])]
            assert not wrong, (Counter(one.split(" ")[0] for one in wrong), wrong[:3])
            assert told[200]
            assert [one["id"] for one in running.get("/v1/models").json()["data"][1:]] == ["a", "b"]


def test_a_file_of_the_same_size_and_time_is_another_prompt(tiny_llama_package: Path, tmp_path: Path) -> None:
    """As `rsync -t` and `cp -p` leave it: the old prompt was served for ever."""
    path = tmp_path / "a.safetensors"
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        runtime.add_folder(tmp_path)
        for number in (0, 1, 2):
            path.write_bytes(version(runtime, "a", number).to_bytes())
            os.utime(path, ns=(10**18, 10**18))
            assert runtime.classify(TEXT, prompt="a").label.startswith(f"a {number}")


def test_a_file_that_is_written_while_it_is_read_is_read_again(
    tiny_llama_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = tmp_path / "a.safetensors", registry._read
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        whole = version(runtime, "a", 1).to_bytes()
        path.write_bytes(whole[:100])
        runtime.add_folder(tmp_path)
        with monkeypatch.context() as patch:  # completed once, after it was read in part
            patch.setattr(registry, "_read", lambda file: (plain(file), path.write_bytes(whole), patch.undo())[0])
            assert runtime.classify(TEXT, prompt="a").label.startswith("a 1")


def test_a_prompt_that_is_replaced_while_a_request_waits_is_asked_for_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a 404 that said that the model cannot be served."""
    path = tmp_path / "a.safetensors"
    with edgeprompt.load(package, options=dataclasses.replace(QUIET, prefix_budget=0)) as runtime:
        save_prompt(version(runtime, "a", 0), path)
        runtime.add_folder(tmp_path)
        plain, left = runtime._resolve, [3]

        def resolve(*given: Any) -> Any:
            found = plain(*given)
            if left[0]:
                left[0] -= 1
                path.write_bytes(version(runtime, "a", (3 - left[0]) % VERSIONS).to_bytes())
            return found

        monkeypatch.setattr(runtime, "_resolve", resolve)
        with serving(runtime) as running:
            answer = running.post("/v1/classify", {"model": "a", "input": TEXT})
            assert answer.status_code == 200, answer.text
            assert answer.json()["data"][0]["label"].startswith("a 3")
            left[0] = 1000  # without end
            answer = running.post("/v1/classify", {"model": "a", "input": TEXT})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "prompt_replaced")
            assert answer.headers["retry-after"] == "1"
            left[0] = 0
            path.unlink()
            assert running.post("/v1/classify", {"model": "a", "input": TEXT}).status_code == 404


def test_only_what_can_be_served_is_listed(tiny_llama_package: Path, tmp_path: Path) -> None:
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        data = version(runtime, "a", 0).to_bytes()
        runtime.add_folder(tmp_path)
        for name in (b"good", b".hidden", b"bytes \xff"):
            (tmp_path / os.fsdecode(name + b".safetensors")).write_bytes(data)
        (tmp_path / "folder.safetensors").mkdir()
        (tmp_path / ".safetensors").write_bytes(data)
        (tmp_path / "link.safetensors").symlink_to("good.safetensors")
        (tmp_path / "nowhere.safetensors").symlink_to("missing")
        os.mkfifo(tmp_path / "pipe.safetensors")
        assert runtime.prompts == ("good", "link")
        with serving(runtime) as running:
            base = runtime.manifest.base.name
            assert [one["id"] for one in running.get("/v1/models").json()["data"]] == [base, "good", "link"]
            assert running.post("/v1/classify", {"model": "good", "input": TEXT}).status_code == 200
            for name in ("folder", "nowhere", "pipe", ".hidden", "bytes \udcff"):
                answer = running.post("/v1/classify", {"model": name, "input": TEXT})
                assert answer.status_code in (400, 404), answer.text
            (tmp_path / "good.safetensors").unlink()  # "link" goes nowhere now; both were loaded or listed
            assert [one["id"] for one in running.get("/v1/models").json()["data"]] == [base]


def test_a_prompt_of_another_base_is_not_listed_and_told_once(
    tiny_llama_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such prompts were listed, and asked for they gave a 404."""
    with edgeprompt.load(tiny_llama_package, options=QUIET) as runtime:
        good = version(runtime, "g", 0)
        save_prompt(good, tmp_path / "good.safetensors")
        other = dataclasses.replace(good, base=Base("gpt9", "sha256:9"))
        save_prompt(other, tmp_path / "other.safetensors")
        far = {"kl_mean": 0.6}
        away = dataclasses.replace(good, tuned_for=TunedFor("int4", "sha256:0"), training={TUNED_QUALITY: far})
        save_prompt(away, tmp_path / "away.safetensors")
        (tmp_path / "half.safetensors").write_bytes(good.to_bytes()[:-1])
        (tmp_path / "junk.safetensors").write_bytes(b"junk")
        time.sleep(0.05)
        runtime.add_folder(tmp_path)
        with serving(runtime) as running:
            base = runtime.manifest.base.name
            for _ in range(3):
                assert [one["id"] for one in running.get("/v1/models").json()["data"]] == [base, "good"]
            told = [one.getMessage() for one in caplog.records if one.name == "edgeprompt"]
            assert [message.split("'")[1] for message in told] == ["away", "half", "junk", "other"]
            assert "was made for base 'gpt9'" in told[-1]
            answer = running.post("/v1/classify", {"model": "other", "input": TEXT})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_servable")
            assert "was made for base 'gpt9'" in answer.text
            assert str(tmp_path) not in answer.text
            answer = running.post("/v1/classify", {"model": "away", "input": TEXT})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_servable")
            assert str(tiny_llama_package) not in answer.text
            for name in ("other", "half"):
                save_prompt(good, tmp_path / f"{name}.safetensors")
            names = [one["id"] for one in running.get("/v1/models").json()["data"]]
            assert names == [base, "good", "half", "other"]
