"""Millions of records: a package's answers through Ray Data. Needs the extra `ray`.

Ray reads, schedules, retries and writes. `Answers` is the class that its actors run, and `answer` puts it into a
dataset's plan. `edgeprompt run --engine ray` does this for files.
"""

from __future__ import annotations

from edgeprompt.ray.answers import Answers, answer, import_ray

__all__ = ["Answers", "answer", "import_ray"]
