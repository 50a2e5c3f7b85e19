"""Closed, full and narrow standard streams: one line and exit code 1, or the work done; an answer is never lost."""

import json
import os
import subprocess
import sys

import pytest

from edgeprompt import save_prompt


@pytest.fixture(scope="module")
def commands(tiny_llama_package, tiny_llama_base, prompt_folder, tmp_path_factory):
    """Name -> arguments; each works on its own outputs."""
    home = tmp_path_factory.mktemp("streams")
    (home / "d.csv").write_text("text,label\n" + "good film,positive\nbad film,negative\n" * 4)
    prompt = prompt_folder / "sentiment.safetensors"
    bench = ("--input-tokens", 4, "--new-tokens", 2, "--batch", 1, "--tasks", 1, "--repetitions", 1, "--warmup", 0)
    return {
        "run": ("run", tiny_llama_package, "hello", "--max-new-tokens", 2),
        "run two": ("run", tiny_llama_package, "a", "b", "--max-new-tokens", 2),
        "run stdin": ("run", tiny_llama_package, "--max-new-tokens", 2),
        "eval": ("eval", tiny_llama_package, home / "d.csv", "--prompt", prompt),
        "inspect": ("inspect", tiny_llama_package),
        "validate": ("validate", tiny_llama_package, "--against", tiny_llama_base),
        "bench": ("bench", tiny_llama_package, *bench),
        "convert": ("convert", prompt, "-o", home / "out.npy", "--force"),
        "export": ("export", tiny_llama_base, "-o", home / "package", "--force"),
        "tune": ("tune", tiny_llama_base, home / "d.csv", "-o", home / "tuned.safetensors", "--steps", 1),
        "help": ("--help",),
        "version": ("--version",),
    }


def shell(args, how, **environment):
    """(exit code, stdout, stderr) of a command with a redirection of the shell."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {how}', "sh", sys.executable, "-m", "edgeprompt", *map(str, args)],
        capture_output=True, check=False, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, timeout=120,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def one_line(error):
    """The last line, behind notes; there is no traceback."""
    assert "Traceback" not in error
    lines = error.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, error
    return lines[-1]


@pytest.mark.parametrize("name", ["run", "eval", "inspect", "validate", "bench"])
def test_a_closed_stdout_is_told_before_the_work(commands, name):
    code, _, error = shell(commands[name], ">&-")
    assert code == 1
    assert one_line(error).startswith("error: stdout is closed")


@pytest.mark.parametrize("name", ["convert", "export", "tune"])
def test_commands_that_write_a_file_need_no_stream(commands, name):
    """What is printed would else go into the first files opened, which would take the streams' numbers."""
    assert shell(commands[name], "<&- >&- 2>&-")[0] == 0


def test_a_closed_stdin_is_one_line(commands):
    code, out, error = shell(commands["run stdin"], "<&-")
    assert (code, out) == (1, "")
    assert one_line(error) == "error: stdin is closed; give TEXT or --input FILE"
    assert shell(commands["run"], "<&-")[0] == 0


def test_a_closed_stderr_changes_nothing(commands):
    assert shell(commands["run"], "2>&-")[:2] == shell(commands["run"], "")[:2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["run two", "version", "convert"])
def test_a_full_stdout_is_one_line(commands, name):
    code, _, error = shell(commands[name], ">/dev/full")
    assert code == 1
    assert one_line(error) == "error: No space left on device"


@pytest.mark.parametrize("name", ["run two", "help"])
def test_a_reader_that_has_left_is_no_error(commands, name):
    code, _, error = shell(commands[name], "| true")
    assert error == ""
    assert code in (0, 1)


@pytest.fixture
def foreign(make_prompt, tmp_path):
    """A prompt whose labels, and a data file whose texts, no Western code page holds."""
    words = {"\u597d": (" good",), "\u574f": (" bad",)}
    save_prompt(make_prompt("foreign", verbalizer=words), tmp_path / "foreign.safetensors")
    (tmp_path / "d.csv").write_text("text,label\ngood film,\u597d\nbad film,\u574f\n", "utf-8")
    return tmp_path


def test_an_answer_that_stdout_cannot_write_is_an_error(foreign, tiny_llama_package):
    args = ("run", tiny_llama_package, "a", "b", "--prompt", foreign / "foreign.safetensors")
    code, _, error = shell(args, "", PYTHONIOENCODING="cp1252")
    assert code == 1
    assert "stdout (cp1252) cannot write; set PYTHONIOENCODING=utf-8" in one_line(error)
    right = shell(args, "", PYTHONIOENCODING="utf-8")[1]
    code, out, _ = shell((*args, "--json"), "", PYTHONIOENCODING="cp1252")
    assert code == 0
    assert [json.loads(line)["label"] for line in out.splitlines()] == [
        line.split("\t")[0] for line in right.splitlines()
    ]
    target = foreign / "out.csv"
    assert shell((*args, "--output", target), "", PYTHONIOENCODING="cp1252")[0] == 0
    assert {"\u597d", "\u574f"} & set(target.read_text("utf-8").replace("\n", ",").split(","))


def test_reports_come_with_escapes(foreign, tiny_llama_package):
    prompt = foreign / "foreign.safetensors"
    for args in (("inspect", prompt), ("eval", tiny_llama_package, foreign / "d.csv", "--prompt", prompt)):
        code, out, error = shell(args, "", PYTHONIOENCODING="cp1252")
        assert code == 0, error
        assert "\\u597d" in out
        code, out, _ = shell((*args, "--json"), "", PYTHONIOENCODING="ascii")
        assert code == 0
        assert "\u597d" in json.dumps(json.loads(out.splitlines()[0]), ensure_ascii=False)
