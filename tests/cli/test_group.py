"""The group: commands, usage errors, errors as one line."""

import pytest

import edgeprompt
from edgeprompt.cli import COMMANDS


def test_help_lists_every_command_with_a_line(cli):
    result = cli("--help")
    assert result.exit_code == 0
    listed = [line.split(maxsplit=1) for line in result.stdout.partition("Commands:\n")[2].splitlines()]
    assert [line[0] for line in listed] == list(COMMANDS)
    assert all(len(line) == 2 for line in listed)


def test_version(cli):
    assert cli("--version").stdout.strip().endswith(edgeprompt.__version__)


def test_every_command_has_help(cli):
    for name in COMMANDS:
        result = cli(name, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage:")


def test_usage_errors_exit_with_2(cli, tmp_path):
    for args in (["nothing"], ["run"], ["export", "base"], ["run", tmp_path, "--threads", "0", "text"]):
        result = cli(*args)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Usage:" in result.stderr


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("run", "package", "text"), "--temperature"),
        (("serve", "package"), "--grace"),
        (("serve", "package"), "--timeout"),
        (("tune", "base", "data", "-o", "a.safetensors"), "--lr"),
        (("tune", "base", "data", "-o", "a.safetensors"), "--epochs"),
        (("tune", "base", "data", "-o", "a.safetensors"), "--temperature"),
        (("export", "base", "-o", "package"), "--tolerance"),
    ],
)
def test_numbers_are_finite(cli, command, option, value):
    result = cli(*command, option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': {value} is no finite number." in result.stderr


def test_what_the_system_refuses_is_one_line(refused, tiny_llama_package, tmp_path):
    line = refused("run", tiny_llama_package, "--input", tmp_path / "missing.txt")
    assert line == f"{tmp_path / 'missing.txt'}: No such file or directory"


def test_a_missing_library_is_one_line_with_the_install_command(spawn, tiny_llama_base, tmp_path):
    without = "import sys; sys.modules['torch'] = None"
    with spawn("export", tiny_llama_base, "-o", tmp_path / "package", before=without) as it:
        out, error = it.communicate(timeout=60)
    assert it.returncode == 1
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("error: this needs 'torch', which is not installed: pip install 'edgeprompt[")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("eval", "package", "data", "--prompt", "p"), "--limit"),
        (("eval", "package", "data", "--prompt", "p"), "--seed"),
        (("run", "package", "text"), "--top-k"),
        (("tune", "base", "data", "-o", "a.safetensors"), "--seed"),
        (("serve", "package"), "--max-queue"),
        (("bench", "package"), "--repetitions"),
    ],
)
def test_counts_are_no_larger_than_a_count_can_be(cli, command, option):
    result = cli(*command, option, 2**70)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': {2**70} is larger than" in result.stderr
