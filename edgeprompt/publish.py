"""A package or a prompt file to the Hugging Face Hub, with a model card that says what it is."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.errors import HubError, InputError, MissingDependencyError
from edgeprompt.package.folder import open_package
from edgeprompt.package.hub import reason
from edgeprompt.package.manifest import Base, Manifest

_LOG = logging.getLogger("edgeprompt")
CARD = "README.md"
_OURS = 'library_name: "edgeprompt"'
"""In the metadata of the cards that are written here."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Card:
    """What a model card says; every line comes from the files themselves."""

    title: str
    base: Base
    lines: tuple[str, ...]
    usage: str
    tags: tuple[str, ...]
    licence: str | None = None

    def text(self, before: str = "") -> str:
        """The file, with the metadata that the Hub reads.

        Args:
            before: The repository's card, one of ours. What it says of other packages and prompts stays.

        Raises:
            HubError: `before` has metadata that cannot be read.
        """
        head: dict[str, Any] = {"library_name": "edgeprompt", "tags": ["edgeprompt", *self.tags]}
        if _REPO.fullmatch(self.base.name):
            head["base_model"] = self.base.name
        if self.licence:
            head["license"] = self.licence
        others, old = [], {}
        if before.strip():
            from huggingface_hub import ModelCard

            try:
                card = ModelCard(before)
            except Exception as error:  # YAML's errors are none of Python's own
                raise HubError(f"the metadata of {CARD} there cannot be read; mend it first: {error}") from error
            old = card.data.to_dict()  # type: ignore[no-untyped-call]
            sections = re.split(r"^# ", card.text, flags=re.MULTILINE)[1:]
            others = [f"# {one.rstrip()}" for one in sections if self.usage not in one]
        if others:
            head = {**old, **head, "tags": list(dict.fromkeys([*_listed(old.get("tags", [])), *head["tags"]]))}
            bases = {str(one) for each in (old, head) for one in _listed(each.get("base_model", []))}
            if len(bases) > 1:
                head["base_model"] = sorted(bases)
        front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())  # JSON is YAML
        facts = "\n".join(f"- {line}" for line in self.lines)
        ours = f"# {_plain(self.title)}\n\n{facts}\n\n```sh\n{self.usage}\n```"
        return f"---\n{front}\n---\n" + "\n\n".join([*others, ours]) + "\n"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def package_card(manifest: Manifest, repo: str, licence: str | None) -> Card:
    """The card of a package."""
    pinned = manifest.extra.get("base_revision")
    lines = [
        f"{_named(manifest.base.name)} ({manifest.architecture}, {_plain(manifest.model_type)}) as one ONNX graph that "
        f"takes soft prompts; precision {_plain(manifest.precision)}.",
        f"Base fingerprint {_code(manifest.base.brief)}.",
        *([f"Exported from {_code(str(pinned))}."] if pinned else []),
        *_quality(manifest.quality),
        "Made with "
        + ", ".join(_plain(f"{name} {version}") for name, version in sorted(manifest.versions.items()))
        + ".",
    ]
    usage = f"pip install 'edgeprompt[cpu,hub]'\nedgeprompt run {repo} \"your text\""
    return Card(repo, manifest.base, tuple(lines), usage, ("onnx", manifest.precision), licence)


def prompt_card(file: Path, repo: str, licence: str | None) -> Card:
    """The card of a prompt file."""
    from edgeprompt.prompts.file import load_prompt

    prompt = load_prompt(file)
    lines = [
        f"A soft prompt for {_named(prompt.base.name)}: {prompt.method}, {prompt.num_virtual_tokens} virtual tokens, "
        f"task {prompt.task}.",
        f"Base fingerprint {_code(prompt.base.brief)}.",
        f"Template {_code(json.dumps(str(prompt.template), ensure_ascii=False))}.",
    ]
    labels = [*(prompt.labels or prompt.verbalizer)]
    if labels:
        lines.append("Labels: " + ", ".join(map(_label, labels)) + ".")
    if prompt.tuned_for is not None:
        tuned = prompt.tuned_for if isinstance(prompt.tuned_for, tuple) else (prompt.tuned_for,)
        lines.append(f"Tuned for weights at {', '.join(_plain(one.precision) for one in tuned)}.")
    if prompt.golden is not None:
        lines.append("It holds a golden example, which `edgeprompt validate PACKAGE --prompt FILE` asks.")
    usage = f'edgeprompt run PACKAGE --prompt {_shown(shlex.quote(f"{repo}/{file.name}"))} "your text"'
    return Card(f"{prompt.name} ({repo})", prompt.base, tuple(lines), usage, ("soft-prompt", prompt.method), licence)


def push(
    source: Path, repo: str, *, private: bool = False, licence: str | None = None, message: str | None = None
) -> str:
    """Put a package or a prompt file into a repository, which is made where it is not there; one commit.

    A model card that edgeprompt did not write is left as it is; one that it wrote keeps what it says of other files.

    Args:
        source: a package folder, or a prompt file.
        repo: `user/repo`.
        private: make a new repository private.
        licence: the base's licence, as the Hub names it ("apache-2.0"); what the card says.
        message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        InputError: the name is no repository's, or the source is neither.
        PackageError, PromptFileError: the source is broken.
        HubError: the Hub refuses, or cannot be reached.
        MissingDependencyError: the extra `hub` is not installed.
    """
    if not _REPO.fullmatch(repo):
        raise InputError(f"{repo!r} is no name of a repository; give user/repo")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("push needs huggingface_hub: pip install 'edgeprompt[hub]'") from error
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        if source.is_dir():
            package = open_package(source)
            package.verify()
            card = package_card(package.manifest, repo, licence)
            for name in _files(package.manifest, source):
                _link(source / name, staged / name)
        elif source.suffix == ".safetensors" and source.is_file():
            card = prompt_card(source, repo, licence)
            _link(source, staged / source.name)
        else:
            raise InputError(f"nothing to push at {str(source)!r}; give a package folder or a prompt file")
        try:
            hub = huggingface_hub.HfApi()
            hub.create_repo(repo, private=private, exist_ok=True)
            before = _card_of(hub, repo)
            if not before.strip() or _OURS in before.split("\n---", 1)[0]:
                (staged / CARD).write_text(card.text(before), encoding="utf-8")
            else:
                _LOG.warning("note: %s has a model card that edgeprompt did not write; it is left as it is", repo)
            done = hub.upload_folder(
                repo_id=repo, folder_path=staged, commit_message=message or f"{source.name}, by edgeprompt push"
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise HubError(f"cannot push to {repo!r}: {reason(error)}") from error
    return str(done.commit_url)


def _card_of(hub: Any, repo: str) -> str:
    """A repository's card; empty where it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            file = hub.hf_hub_download(repo, CARD, local_dir=folder)
        except EntryNotFoundError:
            return ""
        return Path(file).read_text("utf-8", errors="replace")


def _files(manifest: Manifest, folder: Path) -> list[str]:
    """What belongs to a package, and nothing else that lies in its folder."""
    needed = [name for graph in manifest.graphs.values() for name in (graph.file, *graph.data)]
    optional = [names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE, "genai_config.json"]
    found = [name for name in optional if (folder / name).is_file()]
    return [names.MANIFEST, *needed, *manifest.prompts, *found]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # Windows, without the right to
        shutil.copyfile(source, target)


def _quality(quality: Mapping[str, Any]) -> list[str]:
    if not quality:
        return ["Its quality was not compared with the base."]
    told = ", ".join(
        _plain(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        for name, value in quality.items()
    )
    return [f"Beside its base: {told}."]


def _named(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if _REPO.fullmatch(base) else _plain(base)


def _shown(text: str) -> str:
    """A text on one line; what is no visible sign, or turns the order of letters, is written as an escape."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _plain(text: str) -> str:
    """A text in Markdown as it is: none of its signs is read as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|~&#!$])", r"\\\1", _shown(text))


def _label(label: str) -> str:
    return _plain(json.dumps(label, ensure_ascii=False) if "," in label or label != label.strip() else label)


def _code(text: str) -> str:
    """A text as code in Markdown, whatever backticks it has."""
    text = _shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
