"""The documentation follows the code: generated help, links, and commands that parse."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from edgeprompt.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])


@pytest.mark.parametrize("page", ["help", "api"])
def test_generated_pages_follow_the_code(page):
    spec = importlib.util.spec_from_file_location(f"make_{page}", ROOT / "docs" / f"make_{page}.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "docs" / f"{page}.md").read_text("utf-8") == maker.text(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sources_that_are_named_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"(?<![\w./-])(?:tests|edgeprompt|exporters|benchmarks)/[\w./-]*\.(?:py|json|txt)\b", text):
        assert (ROOT / name).exists() or page.name == "CHANGES.md", f"{page.name} names {name}"
    for name in re.findall(r"python -m ((?:benchmarks|tests)(?:\.\w+)*)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name} runs {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_parse(page):
    """Every `edgeprompt ...` line in a shell block is a command with options that exist."""
    for kind, block in re.findall(r"```(sh|bash|console)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        for line in lines if kind != "console" else [line for line in lines if line.startswith("$ ")]:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if not words or words[0] != "edgeprompt":
                continue
            words = words[1 : next((i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")), None)]
            if words[0] in ("--version", "--help"):
                continue
            assert words[0] in COMMANDS, line
            command = main.get_command(click.Context(main), words[0])
            try:
                command.make_context(words[0], words[1:])
            except click.exceptions.Exit:
                pass
            except click.UsageError as error:
                pytest.fail(f"{page.name}: {line!r}: {error.format_message()}")
