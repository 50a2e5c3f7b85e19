"""Progress off a terminal: when a line comes, and what it says."""

import threading

import pytest

from edgeprompt import progress
from edgeprompt.bench.memory import PeakSplit
from edgeprompt.progress import Lines


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    return Lines("run", 200, unit="rows")


def after(lines, monkeypatch, seconds, done, note=""):
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(seconds))
    lines.update(done, note)
    return lines.line(float(seconds)) if lines.due(float(seconds)) else None


def test_short_work_says_nothing(lines, monkeypatch):
    assert after(lines, monkeypatch, 9, 150) is None


def test_a_line_has_share_rate_and_time_left(lines, monkeypatch):
    assert after(lines, monkeypatch, 10, 50) == "run: 50 of 200 rows (25%), 5.0 rows/s, 0:10 so far, about 0:30 left"


def test_time_that_passes_within_a_step_counts(lines, monkeypatch):
    after(lines, monkeypatch, 10, 50)
    assert lines.line(25.0).endswith("0:25 so far, about 0:15 left")
    assert lines.line(90.0).endswith("1:30 so far")


def test_a_tenth_or_a_minute_makes_a_line(lines):
    lines._told_at, lines._told = 10.0, 50
    for now, done, due in ((19, 150, False), (20, 60, False), (20, 70, True), (69, 51, False), (70, 51, True)):
        lines._done = done
        assert lines.due(float(now)) is due, (now, done)


def test_what_was_done_before_is_no_speed(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    resumed = Lines("run", 200, start=100, unit="rows")
    assert (
        after(resumed, monkeypatch, 10, 150) == "run: 150 of 200 rows (75%), 5.0 rows/s, 0:10 so far, about 0:10 left"
    )


def test_stages_and_unknown_totals(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    stages, rows = Lines("export", 1.0), Lines("run", None, unit="rows")
    assert after(stages, monkeypatch, 3700, 0.5, "build") == "export: 50%, build, 1:01:40 so far, about 1:01:40 left"
    assert after(rows, monkeypatch, 20, 3000) == "run: 3000 rows, 150 rows/s, 0:20 so far"


class _Interrupted(threading.Thread):
    """A thread that a signal reaches its starter of, once it runs."""

    def start(self):
        super().start()
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["lines", "memory"])
def test_a_signal_while_a_thread_starts_leaves_none_behind(where, monkeypatch):
    """It went on: lines every few seconds, or a look at the memory every 5 ms, until the process ended."""
    monkeypatch.setattr(threading, "Thread", _Interrupted)
    before = set(threading.enumerate())
    work = Lines("test", 10).written() if where == "lines" else PeakSplit()
    with pytest.raises(KeyboardInterrupt), work:
        pass
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()
