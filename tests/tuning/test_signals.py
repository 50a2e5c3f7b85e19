"""A run that is stopped by a signal leaves a checkpoint, says so in one line, and goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgeprompt.tuning.loop import uninterrupted
from edgeprompt.tuning.options import checkpoint_path

WORDS = ("--verbalizer", "animal= cat", "--verbalizer", "number= two")
STEPS = 2000
"""Evaluated after a fifth: a signal after a few steps is before the first evaluation."""


def command(base: Path, data: Path, out: Path, *more: Any) -> list[str]:
    options = ["--virtual-tokens", "2", "--batch-size", "2", "--steps", str(STEPS)]
    # A process that a script started in the background ignores Ctrl-C, and so do its children: not this one.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}\nfrom edgeprompt.cli import main; main()"
    return [sys.executable, "-c", code, "tune", *map(str, (base, data, "-o", out, *options, *more))]


def started(args: list[str], log: Path, steps: int) -> subprocess.Popen[str]:
    """The process, after its log has some steps."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # also where nohup runs the tests
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **heard)
    deadline = time.monotonic() + 300
    figures = log / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if figures.exists() and figures.read_text().count("\n") >= steps:
            return process
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no step was made: {process.communicate()}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.csv"
    file.write_text("text,label\n" + "a cat,animal\none two,number\n" * 8)
    return file


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        pytest.param(signal.SIGHUP, 129, "stopped by SIGHUP", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_the_first_evaluation_leaves_a_checkpoint(
    tiny_llama_base: Path, data: Path, tmp_path: Path, number: signal.Signals, code: int, how: str
) -> None:
    out = tmp_path / "p.safetensors"
    process = started(command(tiny_llama_base, data, out, "--log", tmp_path / "log"), tmp_path / "log", 5)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    (line,) = error.splitlines()
    assert line.startswith(f"error: {how} after step ")
    assert f"go on with --resume {checkpoint_path(out)}" in line
    assert checkpoint_path(out).is_file()
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("place", "more"),
    [
        ("loop:Loop._choose", ()),
        pytest.param("tuner:prompt_file", (), marks=pytest.mark.slow),
        pytest.param("tuner:save_prompt", (), marks=pytest.mark.slow),
        ("distil:closeness", ("--distil", "Cat or number? {text}\nIt is")),
    ],
)
def test_a_signal_behind_the_last_step_names_the_checkpoint(
    tiny_llama_base: Path, data: Path, tmp_path: Path, place: str, more: tuple[str, ...]
) -> None:
    module, name = place.split(":")
    code = (
        "import os, signal\n"
        f"import edgeprompt.tuning.{module} as owner\n"
        f"*path, last = {name!r}.split('.')\n"
        "for part in path:\n"
        "    owner = getattr(owner, part)\n"
        "setattr(owner, last, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))\n"
        "from edgeprompt.cli import main\n"
        "main()\n"
    )
    out = tmp_path / "p.safetensors"
    args = ["tune", tiny_llama_base, data, "-o", out, "--steps", "2", "--batch-size", "2", *WORDS, *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 143, done.stderr
    assert f"stopped by SIGTERM after step 2; go on with --resume {checkpoint_path(out)}" in done.stderr
    assert checkpoint_path(out).is_file()
    assert not out.exists()


def test_a_signal_behind_the_teachers_answers_names_them(tiny_llama_base: Path, data: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "import edgeprompt.tuning.distil as owner\n"
        "owner._read_data = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from edgeprompt.cli import main\n"
        "main()\n"
    )
    out = tmp_path / "p.safetensors"
    args = ["tune", tiny_llama_base, data, "-o", out, *WORDS, "--distil", "Cat or number? {text}\nIt is"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 143, done.stderr
    kept = out.with_suffix(".teacher.jsonl")
    assert (
        f"before the first step; {str(kept)!r} keeps the teacher's answers, and the same command goes on" in done.stderr
    )
    assert kept.is_file()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tiny_llama_base: Path, data: Path, tmp_path: Path) -> None:
    from edgeprompt.tuning import TuneOptions, tune

    options: dict[str, Any] = {"num_virtual_tokens": 2, "batch_size": 2, "steps": 12, "eval_steps": 6, "name": "p"}
    whole = tune(tiny_llama_base, data, output=tmp_path / "whole.safetensors", options=TuneOptions(**options))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from edgeprompt.cli import _terminable\n"
        "from edgeprompt.tuning import TuneOptions, tune\n"
        "from edgeprompt.tuning.loop import Loop\n"
        "plain = Loop._train_step\n"
        "def step(self):\n"
        "    found = plain(self)\n"
        "    if self.progress.step == 3:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return found\n"
        "Loop._train_step = step\n"
        "with _terminable():\n"
        f"    tune({str(tiny_llama_base)!r}, {str(data)!r}, output={str(tmp_path / 'p.safetensors')!r}, "
        f"options=TuneOptions(**{options!r}))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "stopped by SIGTERM after step 3" in done.stderr
    again = TuneOptions(**options, resume=checkpoint_path(tmp_path / "p.safetensors"))
    parts = tune(tiny_llama_base, data, output=tmp_path / "p.safetensors", options=again)
    assert parts.path.read_bytes() == whole.path.read_bytes()


def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from edgeprompt.cli import _terminable\n"
        "with _terminable():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(1)\n"
        "    finally:\n"
        "        print('saving', flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


def test_a_signal_waits_for_an_update() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
