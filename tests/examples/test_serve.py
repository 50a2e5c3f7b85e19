"""The container file and the systemd unit: their syntax, and that the commands in them exist."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click

from edgeprompt.cli import main

HOME = Path(__file__).resolve().parents[2] / "examples/serve"
INSTRUCTIONS = {"FROM", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT"}


def options_of(words: list[str]) -> dict[str, object]:
    """What a command line says, as click reads it."""
    assert Path(words[0]).name == "edgeprompt"
    command = main.get_command(click.Context(main), words[1])
    assert command is not None
    found: dict[str, object] = command.make_context(words[1], words[2:]).params
    return found


def test_the_container_file() -> None:
    text = (HOME / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    found = [line.split(None, 1) for line in lines]
    assert {name for name, _ in found} == INSTRUCTIONS
    assert found[0][0] == "FROM"
    last = dict(found)
    assert last["USER"] not in ("root", "0")
    for value in (last["VOLUME"], last["HEALTHCHECK"].partition("CMD ")[2], last["ENTRYPOINT"]):
        assert all(isinstance(word, str) for word in json.loads(value))
    options = options_of(json.loads(last["ENTRYPOINT"]))
    assert (options["host"], str(options["port"])) == ("0.0.0.0", last["EXPOSE"])
    assert options["grace"] < 10  # type: ignore[operator]  # what container engines wait before they kill
    assert not options["keys"]
    compile(json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2], "HEALTHCHECK", "exec")


def test_the_unit() -> None:
    path = HOME / "edgeprompt.service"
    unit = configparser.RawConfigParser(strict=True, delimiters="=", comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    assert unit.sections() == ["Unit", "Service", "Install"]
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", name) for section in unit.sections() for name in unit[section])
    service = unit["Service"]
    options = options_of(shlex.split(service["ExecStart"]))
    assert not options["keys"]
    assert str(options["api_key_file"]) == "${CREDENTIALS_DIRECTORY}/api-key"
    assert float(service["TimeoutStopSec"]) > float(str(options["grace"]))
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
        assert not re.search("Unknown|Failed to parse|ignoring", done.stderr), done.stderr
