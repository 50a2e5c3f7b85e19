"""A process of its own, whose start and memory are measured: `python -m edgeprompt.bench.worker JOB ...`.

`first` answers one text and says so; `memory` loads all prompts, answers with the first and the last, and tells how
much memory that took.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprompt.runtime import Runtime


def main() -> None:
    """Run one job; the result goes to stdout as a JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("first", "memory"))
    parser.add_argument("--package", required=True)
    parser.add_argument("--prompts", required=True, help="a prompt file, or a folder of them")
    parser.add_argument("--text", required=True)
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    path = Path(arguments.prompts)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `edgeprompt run` does: they would never work here
    if arguments.job == "first":
        _answer(arguments, [path])
        print(json.dumps({"answered": True}), flush=True)
        return
    from edgeprompt.bench.memory import PeakSplit, peak_rss, split_rss

    with PeakSplit() as split:
        runtime = _answer(arguments, sorted(path.iterdir()))
        now = split_rss()
    print(json.dumps({"peak": peak_rss(), "peak_split": split.peak, "now": now}), flush=True)
    runtime.close()


def _answer(arguments: argparse.Namespace, files: list[Path]) -> Runtime:
    from edgeprompt import EngineOptions, GenerationOptions, Request, load

    options = EngineOptions(allow_other_weights=True, reuse_texts=False)
    runtime = load(arguments.package, provider=arguments.provider, threads=arguments.threads, options=options)
    names = [runtime.add_prompt(file, name=file.stem) for file in files]
    for name in dict.fromkeys((names[0], names[-1])):
        runtime.run([Request(arguments.text, name, options=GenerationOptions(max_new_tokens=1))])
    return runtime


if __name__ == "__main__":
    main()
