"""What only a terminal, a pipe or a signal shows."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "edgeprompt"]


def on_terminal(*args, stdout):
    """(stdout, stderr) of a command whose stderr, and with stdout=True also stdout, is a terminal."""
    leader, follower = pty.openpty()
    out = follower if stdout else subprocess.PIPE
    with subprocess.Popen(
        [*COMMAND, *map(str, args)], stdin=subprocess.DEVNULL, stdout=out, stderr=follower
    ) as process:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
        printed = process.stdout.read().decode() if process.stdout else ""
    os.close(leader)
    assert process.returncode == 0, shown
    return printed, shown.decode()


def _read(handle):
    try:
        return os.read(handle, 4096)
    except OSError:  # Linux reports the end of a terminal as an error
        return b""


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("Once upon a time\n" * 200)
    return file


def test_progress_is_for_terminals(cli, texts, tiny_llama_package):
    args = ("run", tiny_llama_package, "--input", texts, "--max-new-tokens", 2)
    printed, shown = on_terminal(*args, stdout=False)
    assert "run" in shown
    assert "\x1b[" in shown
    assert "rows/s" in shown
    plain = cli(*args)
    assert plain.stdout == printed
    assert plain.stderr == ""


@pytest.fixture
def soon(monkeypatch):
    """Lines come after a moment already."""
    monkeypatch.setattr("edgeprompt.progress.FIRST_S", 0.02)
    monkeypatch.setattr("edgeprompt.progress.LONGEST_S", 0.02)


def test_run_and_eval_say_how_far_they_are(soon, cli, texts, tiny_llama_package, prompt_folder, tmp_path):
    form = r"%s: \d+ of 200 rows \(\d+%%\), [\d.]+ rows/s, 0:\d\d so far.*"
    plain = cli("run", tiny_llama_package, "--input", texts, "--max-new-tokens", 2)
    assert any(re.fullmatch(form % "run", line) for line in plain.stderr.splitlines()), plain.stderr
    assert len(plain.stdout.splitlines()) == 200
    data = tmp_path / "d.csv"
    data.write_text("text,label\n" + "good film,positive\nbad film,negative\n" * 100)
    found = cli("eval", tiny_llama_package, data, "--prompt", prompt_folder / "sentiment.safetensors", "--limit", 200)
    assert any(re.fullmatch(form % "eval", line) for line in found.stderr.splitlines()), found.stderr
    assert found.exit_code == 0


def test_long_commands_say_off_a_terminal_how_far_they_are(soon, cli, tiny_llama_base, tiny_llama_package, tmp_path):
    data = tmp_path / "d.csv"
    data.write_text("text,label\n" + "good film,positive\nbad film,negative\n" * 4)
    bench = ("--input-tokens", 4, "--new-tokens", 2, "--batch", 1, "--tasks", 1, "--repetitions", 1, "--warmup", 0)
    for form, *args in (
        (r"export: 70%, validate, .*", "export", tiny_llama_base, "-o", tmp_path / "package"),
        (r"validate: 30%, compare, .*", "validate", tiny_llama_package, "--against", tiny_llama_base),
        (r"tuning: \d of 4 steps \(\d+%\), [\d.]+ steps/s, loss [\d.]+.*", "tune", tiny_llama_base, data, "-o",
         tmp_path / "p.safetensors", "--steps", 4),
        (r"bench: \d+%, .* so far.*", "bench", tiny_llama_package, *bench),
    ):  # fmt: skip
        found = cli(*args)
        assert found.exit_code == 0
        assert any(re.fullmatch(form, line) for line in found.stderr.splitlines()), (args[0], found.stderr)


def test_a_single_answer_is_streamed_to_a_terminal(cli, tiny_llama_package):
    args = ("run", tiny_llama_package, "Once upon a time", "--max-new-tokens", 12)
    _, shown = on_terminal(*args, stdout=True)
    assert shown.replace("\r\n", "\n") == cli(*args).stdout


def test_a_reader_that_leaves_is_no_error(texts, tiny_llama_package):
    args = [*COMMAND, "run", tiny_llama_package, "--input", texts, "--max-new-tokens", "40"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_ctrl_c_ends_a_run_and_leaves_no_output(texts, tiny_llama_package, tmp_path):
    out = tmp_path / "answers.csv"
    args = [*COMMAND, "run", tiny_llama_package, "--input", texts, "--max-new-tokens", "200", "--output", out]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # also where a script runs the tests
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == [texts.name]


def test_ctrl_c_inside_exec_is_an_ordinary_end():
    """CPython would end the process by the signal, although the interrupt was caught (dataclasses are made by exec)."""
    code = (
        "import signal, sys\n"
        "from edgeprompt.cli import _terminable\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # also where nohup runs the tests
        "try:\n"
        "    with _terminable():\n"
        "        exec('import signal; signal.raise_signal(signal.SIGINT)')\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_while_an_object_is_deleted_is_heard(name, code):
    """Python prints and forgets what is raised there; regex's objects, of which torch makes many, have a `__del__`."""
    program = (
        "import signal, sys, time\n"
        "from edgeprompt.cli import _Stopped, _terminable\n"
        "class Object:\n"
        "    def __del__(self):\n"
        f"        signal.raise_signal(signal.{name})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # also where nohup runs the tests
        "try:\n"
        "    with _terminable():\n"
        "        Object()\n"
        "        time.sleep(30)\n"
        "        print('went on')\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("made", ["ImportError('initialization failed')", "SourceError('cannot read the config')"])
def test_a_signal_that_a_library_makes_an_error_of_its_own_of_is_heard(name, code, made):
    """Extension modules do so while they are imported: it was a traceback, or a wrong reason."""
    program = (
        "import signal\n"
        "from edgeprompt.cli import inspect, main\n"
        "from edgeprompt.errors import SourceError\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # also where nohup runs the tests
        "def work(**_):\n"
        "    try:\n"
        f"        signal.raise_signal(signal.{name})\n"
        "    except BaseException:\n"
        f"        raise {made}\n"
        "inspect.command.callback = work\n"
        "main(['inspect', 'x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    said = "Aborted!" if name == "SIGINT" else f"error: stopped by {name}"
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", said)
