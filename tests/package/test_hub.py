"""Packages, prompts, bases and adapters from the Hugging Face Hub, a small one on loopback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprompt import load_prompt, names, save_prompt
from edgeprompt.package import hub as package_hub
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Base
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.template import Template
from edgeprompt.publish import prompt_card
from tests.support.hub import TOKEN, Hub, Repository, small_hub
from tests.support.prompts import make_prompt
from tests.support.runtimes import WORDS


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("user/repo", ("user/repo", None, None)),
        ("user/repo@v1", ("user/repo", "v1", None)),
        ("user/repo@refs/pr/3/a.safetensors", ("user/repo", "refs/pr/3", "a.safetensors")),
        ("user/repo/folder/a b.safetensors", ("user/repo", None, "folder/a b.safetensors")),
        ("user/repo/a, b (1)+é's.safetensors", ("user/repo", None, "a, b (1)+é's.safetensors")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ("HuggingFaceTB/SmolLM2-135M-Instruct", None, None)),
    ],
)
def test_names_of_the_hub(given: str, parts: tuple[str | None, ...]) -> None:
    found = package_hub.parse(given)
    assert found is not None
    assert (found.repo, found.revision, found.file) == parts


@pytest.mark.parametrize(
    "given",
    ["gpt2", "./user/repo", "/user/repo", "../repo", "user/..", "user/../repo", "user/repo/../x", "~/repo", "a/b.gguf",
     "prompts/sentiment.safetensors", "user/repo@", "user\\repo", "", "user/repo@../x", "a/b/",
     "user/repo/*.safetensors", "user/repo/a\n.safetensors"],
)  # fmt: skip
def test_paths_are_not_of_the_hub(given: str) -> None:
    assert package_hub.parse(given) is None


def test_what_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert package_hub.parse("user/repo") is not None
    (tmp_path / "user/repo").mkdir(parents=True)
    assert package_hub.parse("user/repo") is None


def files_of(folder: Path, inside: str = "") -> dict[str, bytes]:
    return {
        f"{inside}{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def served(tiny_llama_package: Path, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with `user/package` and `user/prompts`, which has sentiment.safetensors."""
    prompt = make_prompt(open_package(tiny_llama_package).manifest, "sentiment", verbalizer=WORDS)
    save_prompt(prompt, tmp_path / "sentiment.safetensors")
    with small_hub() as hub:
        hub.repositories["user/package"] = Repository()
        hub.repositories["user/package"].commit(files_of(tiny_llama_package) | {"evil.py": b"raise SystemExit(3)"})
        hub.repositories["user/prompts"] = Repository()
        hub.repositories["user/prompts"].commit(
            {"sentiment.safetensors": (tmp_path / "sentiment.safetensors").read_bytes()}
        )
        yield hub


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(served: Hub, tmp_path: Path) -> Command:
    """`python("-c", ...)` as a process with a cache of its own, pointed at the small Hub."""

    def run(*arguments: Any, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HF_ENDPOINT": served.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # its chunks go to servers of their own
            **variables,
        }
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True, text=True, check=False, env=environment, cwd=tmp_path, timeout=timeout,
        )  # fmt: skip

    return run


@pytest.fixture
def command(python: Command) -> Command:
    """`command("run", ...)`: edgeprompt, as `python`."""
    return lambda *arguments, **variables: python("-m", "edgeprompt", *arguments, **variables)


RUN = ("run", "user/package", "the film", "--prompt", "user/prompts/sentiment.safetensors")


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_package_and_a_prompt_of_the_hub(
    served: Hub, command: Command, tiny_llama_package: Path, tmp_path: Path
) -> None:
    local = command("run", tiny_llama_package, "the film", "--prompt", tmp_path / "sentiment.safetensors")
    found = command(*RUN)
    assert found.returncode == 0, found.stderr
    assert found.stdout == local.stdout
    assert not [path for _, path in served.asked if "evil.py" in path]
    first = len(served.asked)
    assert command(*RUN).stdout == local.stdout
    assert not [path for method, path in served.asked[first:] if method == "GET" and "/resolve/" in path]
    before = len(served.asked)
    assert command(*RUN, HF_HUB_OFFLINE="1").stdout == local.stdout  # a hit, and nobody is asked
    assert len(served.asked) == before
    assert command("inspect", "user/package").returncode == 0


def test_a_miss_offline_is_one_line(command: Command) -> None:
    line = line_of(command("run", "user/package", "a", HF_HUB_OFFLINE="1"))
    assert "no package at 'user/package' on this machine" in line
    assert "HF_HUB_OFFLINE is set" in line


def test_what_is_not_there_is_one_line(served: Hub, command: Command) -> None:
    assert "no repository 'user/nothing'" in line_of(command("run", "user/nothing", "a"))
    assert "has no revision 'v9'" in line_of(command("run", "user/package@v9", "a"))
    assert "has no file 'edgeprompt.json'" in line_of(command("run", "user/prompts", "a"))
    wrong = "user/prompts/other.safetensors"
    assert "has no file 'other.safetensors'" in line_of(command("run", "user/package", "a", "--prompt", wrong))
    served.repositories["user/package"].gated = True
    assert "is gated: accept its terms" in line_of(command("run", "user/package", "a"))


@pytest.mark.slow  # huggingface_hub tries again for 25 seconds
def test_a_hub_that_is_not_reached_is_one_line(command: Command) -> None:
    assert "cannot be reached" in line_of(command("run", "user/package", "a", HF_ENDPOINT="http://127.0.0.1:9"))


def test_a_private_repository_and_its_token(served: Hub, command: Command, tmp_path: Path) -> None:
    served.repositories["user/package"].private = True
    assert "hf auth login" in line_of(command(*RUN))
    found = command(*RUN, HF_TOKEN=TOKEN)
    assert found.returncode == 0, found.stderr
    assert TOKEN not in found.stdout + found.stderr
    served.damage.add("sentiment.safetensors")
    assert TOKEN not in command("run", "user/package@v9", "a", HF_TOKEN=TOKEN).stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_token_that_is_not_ascii_is_named_and_not_shown(command: Command, tmp_path: Path) -> None:
    """A letter with an accent, or the quotes of a text program: it was "'ascii' codec can't encode character"."""
    push = ("push", tmp_path / "sentiment.safetensors", "user/new")
    for arguments in (RUN, push, ("export", "user/package", "-o", tmp_path / "out")):
        line = line_of(command(*arguments, HF_TOKEN="\u201chf_s\xe9cret\u201d"))
        assert "the token (HF_TOKEN, or that of hf auth login) has a character that is not ASCII" in line
        assert not [part for part in ("cret", "201c", "\u201c", "codec") if part in line]


def test_a_file_that_comes_damaged_is_not_used(served: Hub, command: Command, tmp_path: Path) -> None:
    (graph,) = json.loads(_package(served)[names.MANIFEST])["graphs"].values()
    for name in (graph["file"], "sentiment.safetensors"):  # a large file, and a small one
        home = str(tmp_path / f"home of {name}")
        served.damage = {name}
        line = line_of(command(*RUN, HF_HOME=home))
        assert f"{name!r}" in line
        assert "came damaged" in line
        served.damage = set()
        assert command(*RUN, HF_HOME=home).returncode == 0  # what was damaged is fetched again


def test_a_download_that_breaks_goes_on(served: Hub, command: Command) -> None:
    (data,) = [name for name in _package(served) if name.endswith(".onnx.data")] or [names.TOKENIZER]
    served.cut.add(data)
    done = command(*RUN)
    if done.returncode:
        line_of(done)
        done = command(*RUN)
    assert done.returncode == 0, done.stderr
    assert not served.cut


def _package(hub: Hub) -> dict[str, bytes]:
    return _files(hub, "user/package")


def _files(hub: Hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.branches["main"]]


def test_a_revision_that_moves_meanwhile_is_not_mixed(served: Hub, command: Command) -> None:
    """The branch moves after the manifest went out: the other files are of the manifest's commit."""
    repository = served.repositories["user/package"]
    old = repository.branches["main"]

    def move(file: str) -> None:
        if file == names.MANIFEST:
            served.after = None
            repository.commit(dict.fromkeys(_package(served), b"of another commit"))

    served.after = move
    assert command(*RUN).returncode == 0
    assert repository.branches["main"] != old
    paths = [path for method, path in served.asked if method == "GET" and "/user/package/resolve/" in path]
    assert [path for path in paths if old in path]
    assert not [path for path in paths if repository.branches["main"] in path]
    assert command("run", f"user/package@{old}", "the film", "--max-new-tokens", 2).returncode == 0
    assert command("run", "user/package", "the film").returncode == 1  # the branch is now something else


def test_a_package_in_a_folder_of_a_repository(served: Hub, command: Command, tiny_llama_package: Path) -> None:
    served.repositories["user/many"] = Repository()
    served.repositories["user/many"].commit(files_of(tiny_llama_package, "int4/"), branch="v1")
    served.repositories["user/many"].commit({"README.md": b"nothing"})
    assert command("run", "user/many@v1/int4", "the film", "--max-new-tokens", 2).returncode == 0
    assert "has no file 'int4/edgeprompt.json'" in line_of(command("run", "user/many/int4", "a"))


def test_a_base_has_its_commit(served: Hub, python: Command, tiny_llama_base: Path) -> None:
    served.repositories["user/base"] = Repository()
    commit = served.repositories["user/base"].commit(
        files_of(tiny_llama_base) | {"modeling.py": b"raise SystemExit(3)"}
    )
    code = (
        "from edgeprompt.base.source import find_source\n"
        "found = find_source({!r})\n"
        "print(found.name, found.pinned, *sorted(path.name for path in found.folder.iterdir()))"
    )
    name, pinned, *found = python("-c", code.format("user/base")).stdout.split()
    assert (name, pinned) == ("user/base", f"user/base@{commit}")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
    assert "modeling.py" not in found
    served.repositories["user/base"].commit({"config.json": b"{}"})
    assert python("-c", code.format(f"user/base@{commit}")).stdout.split()[1] == pinned
    assert "has no revision 'v9'" in python("-c", code.format("user/base@v9")).stderr


@pytest.mark.slow  # an export
def test_a_base_is_pinned_in_the_manifest(served: Hub, command: Command, tiny_llama_base: Path, tmp_path: Path) -> None:
    served.repositories["user/base"] = Repository()
    commit = served.repositories["user/base"].commit(files_of(tiny_llama_base))
    done = command("export", "user/base", "-o", tmp_path / "out", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    manifest = open_package(tmp_path / "out").manifest
    assert manifest.base.name == "user/base"
    assert manifest.extra["base_revision"] == f"user/base@{commit}"
    line = line_of(command("export", "user/base@v9", "-o", tmp_path / "out2"))
    assert "no revision 'v9'" in line
    assert not (tmp_path / "out2").exists()


def test_without_the_extra_its_name_is_said(command: Command, tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ModuleNotFoundError('none', name='huggingface_hub')", "utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    assert "pip install 'edgeprompt[hub]'" in line_of(command("run", "user/package", "a", PYTHONPATH=path))


def test_push_writes_a_card_and_comes_back(
    served: Hub, command: Command, tiny_llama_package: Path, tmp_path: Path
) -> None:
    assert "cannot push" in line_of(command("push", tiny_llama_package, "user/new"))
    done = command("push", tiny_llama_package, "user/new", "--private", "--license", "apache-2.0", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    repository = served.repositories["user/new"]
    assert done.stdout.strip() == f"{served.url}/user/new/commit/{repository.branches['main']}"
    assert repository.private
    assert TOKEN not in done.stdout + done.stderr
    files = repository.commits[repository.branches["main"]]
    manifest = open_package(tiny_llama_package).manifest
    card = files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: "edgeprompt"\n')
    assert 'license: "apache-2.0"' in card
    for fact in (manifest.base.brief, manifest.precision, "edgeprompt run user/new"):
        assert fact in card
    assert {name: data for name, data in files.items() if name in files_of(tiny_llama_package)} == {
        name: data for name, data in files_of(tiny_llama_package).items() if name in files
    }
    prompt = tmp_path / "sentiment.safetensors"
    assert command("push", prompt, "user/new-prompts", HF_TOKEN=TOKEN).returncode == 0
    card = _files(served, "user/new-prompts")["README.md"].decode()
    assert "Labels: x, y." in card
    found = command("run", "user/new", "the film", "--prompt", f"user/new-prompts/{prompt.name}", HF_TOKEN=TOKEN)
    assert found.stdout == command("run", tiny_llama_package, "the film", "--prompt", prompt).stdout


def test_a_card_quotes_a_file_name_for_the_shell(tiny_llama_package: Path, tmp_path: Path) -> None:
    file = tmp_path / "it's, short.safetensors"
    save_prompt(make_prompt(open_package(tiny_llama_package).manifest, "it's, short"), file)
    *_, wanted, text = shlex.split(prompt_card(file, "user/prompts", None).usage)
    assert (wanted, text) == (f"user/prompts/{file.name}", "your text")
    there = package_hub.parse(wanted)
    assert there is not None
    assert there.file == file.name


def test_a_card_that_somebody_wrote_is_left(served: Hub, command: Command, tmp_path: Path) -> None:
    prompt = tmp_path / "sentiment.safetensors"
    push = ("push", prompt, "user/prompts-of-mine")
    for _ in range(2):  # its own card is replaced
        assert command(*push, HF_TOKEN=TOKEN).stderr == ""
    served.repositories["user/prompts-of-mine"].commit({"README.md": b"# By hand\n"})
    done = command(*push, HF_TOKEN=TOKEN)
    assert (done.returncode, "left as it is" in done.stderr) == (0, True)
    assert _files(served, "user/prompts-of-mine")["README.md"] == b"# By hand\n"


def test_a_card_whose_metadata_were_edited(served: Hub, command: Command, tmp_path: Path) -> None:
    push = ("push", tmp_path / "sentiment.safetensors", "user/edited")
    ours = b'---\nlibrary_name: "edgeprompt"\ntags:\n- films\n---\n# Another\n\n- of ours\n'
    served.repositories["user/edited"] = Repository()
    served.repositories["user/edited"].commit({"README.md": ours})
    assert command(*push, HF_TOKEN=TOKEN).stderr == ""
    card = _files(served, "user/edited")["README.md"].decode()
    assert '"films"' in card
    assert "# Another" in card
    served.repositories["user/edited"].commit({"README.md": ours.replace(b"- films", b"[")})
    done = command(*push, HF_TOKEN=TOKEN)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "cannot be read; mend it first" in done.stderr


def test_a_card_lists_all_that_was_pushed(
    served: Hub, command: Command, tiny_llama_package: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "sentiment.safetensors", tmp_path / "second.safetensors"
    save_prompt(replace(load_prompt(first), name="second", verbalizer={"u": (" up",), "d": (" down",)}), second)
    for source in (first, second, tiny_llama_package, first):  # the first again: it is listed once
        done = command("push", source, "user/several", "--license", "mit", HF_TOKEN=TOKEN)
        assert (done.returncode, done.stderr) == (0, "")
    card = _files(served, "user/several")["README.md"].decode()
    for fact in (
        "Labels: x, y.",
        "Labels: u, d.",
        "/sentiment.safetensors ",
        "/second.safetensors ",
        "run user/several ",
    ):
        assert card.count(fact) == 1, card
    _, front, body = card.split("---\n", 2)
    lines = dict(line.split(": ", 1) for line in front.splitlines())
    assert {"onnx", "fp32", "soft-prompt", "prompt-tuning"} <= set(json.loads(lines["tags"]))
    assert (lines["license"], body.count("\n# ") + body.startswith("# ")) == ('"mit"', 3)


def test_what_cannot_be_pushed_is_one_line(command: Command, tmp_path: Path) -> None:
    assert "is no name of a repository" in line_of(command("push", tmp_path / "sentiment.safetensors", "new"))
    assert "nothing to push" in line_of(command("push", tmp_path / "none", "user/new"))


@pytest.mark.slow  # reads a base
def test_an_adapter_is_converted(served: Hub, command: Command, tiny_llama_base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_base), config).save_pretrained(tmp_path / "adapter")
    for name, folder in (("user/adapter", tmp_path / "adapter"), ("user/base", tiny_llama_base)):
        served.repositories[name] = Repository()
        served.repositories[name].commit(files_of(folder) | {"evil.py": b"raise SystemExit(3)"})
    done = command("convert", "user/adapter", "-o", "hub.safetensors", "--base", "user/base")
    assert done.returncode == 0, done.stderr
    assert command("convert", "adapter", "-o", "local.safetensors", "--base", tiny_llama_base).returncode == 0
    found, local = (load_prompt(tmp_path / name) for name in ("hub.safetensors", "local.safetensors"))
    assert found.prompt_embeddings is not None
    assert local.prompt_embeddings is not None
    assert (found.prompt_embeddings == local.prompt_embeddings).all()
    assert (found.base.name, found.base.fingerprint) == ("user/base", local.base.fingerprint)
    assert command("run", "user/package", "the film", "--prompt", "hub.safetensors", "--max-new-tokens", 2).stdout
    assert "no repository 'user/none'" in line_of(command("convert", "user/none", "-o", "none.safetensors"))
    assert not [path for _, path in served.asked if "evil.py" in path]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_of_the_readme(served: Hub, python: Command, smollm2_gguf: Path, tmp_path: Path) -> None:
    import torch

    from edgeprompt.base.load import load_base

    loaded = load_base(smollm2_gguf)
    loaded.model.to(torch.float16).save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    del loaded
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("edgeprompt export "))
    words = shlex.split(line)
    repository = Repository()
    commit = repository.commit(files_of(tmp_path / "base"))
    served.repositories[words[2]] = repository
    done = python("-m", *words, timeout=1500)
    assert done.returncode == 0, done.stderr
    manifest = open_package(tmp_path / "model").manifest
    assert (manifest.base.name, manifest.precision) == (words[2], "int4")
    assert manifest.extra["base_revision"] == f"{words[2]}@{commit}"
    answered = python("-m", "edgeprompt", "run", "model/", "The capital of France is", "--max-new-tokens", 3)
    assert "Paris" in answered.stdout


def test_a_card_shows_names_and_labels_as_they_are(tmp_path: Path) -> None:
    """Markdown, HTML, tables and lines in them are signs of a text."""
    from huggingface_hub import ModelCard

    labels = ("a|b", "<b>c</b>", "*d*", "e\n# f\n---", "[g](http://h)", "i`j", "k, l", "\u202em", "plain_é")
    prompt = PromptFile(
        name="n\n---\n# x <script>", method="prompt-tuning", task="classify", base=Base("my *base*\n# y", "f"),
        template=Template.parse("{prompt}a `` b\n```{text}"), prompt_embeddings=np.zeros((1, 4), np.float32),
        verbalizer={label: (f" {index}",) for index, label in enumerate(labels)},
    )  # fmt: skip
    file = tmp_path / "a b$(x).safetensors"
    save_prompt(prompt, file)
    read = ModelCard(prompt_card(file, "user/repo", "x\ny: z").text())
    assert read.data.to_dict()["license"] == "x\ny: z"
    lines = read.text.splitlines()
    assert [line for line in lines if line.startswith(("#", "---", "|", "<"))] == [
        r"# n\\n---\\n\# x \<script\> (user/repo)"
    ]
    assert next(line for line in lines if line.startswith("- Labels")) == (
        r"- Labels: a\|b, \<b\>c\</b\>, \*d\*, e\\n\# f\\n---, \[g\](http://h), i\`j, "
        r'"k, l", \\u202em, plain\_é.'
    )
    assert '- Template ```` "{prompt}a `` b\\n```{text}" ````.' in lines
    assert any("--prompt 'user/repo/a b$(x).safetensors'" in line for line in lines)
