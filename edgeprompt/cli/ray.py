"""`edgeprompt run --engine ray`: the options as a job for a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeprompt.cli import console, serving

if TYPE_CHECKING:
    from edgeprompt.evaluation.requests import Questions


def answer_files(
    package: Path,
    source: Path,
    out: Path,
    wanted: Sequence[str],
    folders: Sequence[Path],
    questions: Questions,
    *,
    on_error: str,
    resume: bool,
    address: str | None,
    actors: str | None,
    id_column: str | None,
    allow_base_mismatch: bool,
    session: serving.SessionOptions,
) -> None:
    """Answer the files of `source` on Ray, into a folder of parts."""
    if len(wanted) > 1 and not questions.prompt_column:
        raise click.UsageError("--engine ray answers a record once: give one --prompt, or --prompt-column")
    sizes = _sizes(actors)
    if session["cache"] is not None:
        session = {**session, "cache": session["cache"].absolute()}

    from edgeprompt.ray.answers import import_ray

    import_ray()
    from edgeprompt.evaluation.requests import check_columns
    from edgeprompt.ray.run import Job, run

    here = package.exists()  # else it is on the Hub
    prompts = [serving.find_prompt(package, item).absolute() for item in wanted]
    shared = {"on_error": on_error, "drafts": session["drafts"]}
    job = Job(
        source,
        out,
        str(package.absolute() if here else package),
        {
            "prompts": [str(path) for path in prompts],
            "folders": [str(folder.absolute()) for folder in folders],
            "prompt_column": questions.prompt_column,
            "text_column": questions.text_column,
            "options": questions.options,
            "chat": questions.chat,
            "truncate": questions.truncate,
            "on_error": on_error,
            "allow_base_mismatch": allow_base_mismatch,
            "engine": serving.engine_options(session),
        },
        id_column=id_column,
        resume=resume,
        settings=serving.settings_of(package, None, wanted, folders, questions, **shared) if resume else "",
        address=address,
        actors=sizes,
    )
    with serving.open_runtime(package, **session) as runtime:  # what is wrong is said before a cluster starts
        given = serving.add_prompts(runtime, package, wanted, allow_base_mismatch=allow_base_mismatch)
        for folder in folders:
            runtime.add_folder(folder)
        asked = replace(questions, prompts=tuple(given))
        columns = [*dict.fromkeys(name for row in job.first_records() for name in row)]
        check_columns(asked, columns, runtime.describe, repr(str(source)))
    counted = [serving.count_records(path) for path in job.files]
    known = [count for count in counted if count is not None]
    report = run(job, total=(sum(known) or None) if len(known) == len(counted) else None)
    speed = f", {report.rate:.1f} rows/s" if report.rate else ""
    console.note(f"note: {report.rows} rows answered{speed}")
    if report.failed:
        left = "left out" if on_error == "skip" else "recorded"
        console.note(f"note: {report.failed} answers failed and were {left}; the first: {report.first}")


def _sizes(actors: str | None) -> tuple[int, int | None] | None:
    """Of `--actors`."""
    if actors is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*)?)?", actors)
    if found is None:
        raise click.UsageError(f"--actors is {actors!r}; give a number, or MIN:MAX")
    least = int(found[1])
    return least, least if ":" not in actors else int(found[2]) if found[2] else None
