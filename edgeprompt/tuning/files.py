"""What a run reads and writes: checked before the work; nothing is written over somebody else's file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import safe_open

from edgeprompt import names
from edgeprompt.base.source import find_local
from edgeprompt.errors import DataError, TuningError
from edgeprompt.evaluation.data import DataSource, column_names
from edgeprompt.evaluation.formats import READERS, Record, read_lines
from edgeprompt.package.files import atomic_folder, check_regular
from edgeprompt.package.folder import open_package
from edgeprompt.package.outputs import ADAPTER, ANSWERS, CHECKPOINT, LOG, METRICS, PROMPT, check_output
from edgeprompt.prompts.file import load_prompt
from edgeprompt.tuning.options import TuneOptions, answers_path, checkpoint_path

METRICS_FILE = "metrics.jsonl"


def check_outputs(prompts: Iterable[Path], output: Path, base: object, data: object, options: TuneOptions) -> None:
    """Check every path that a run writes.

    Args:
        prompts: The prompt files.
        output: The output that the run was given; its checkpoint lies beside it.
        base: The base, as it was given.
        data: The data, as it was given.
        options: The run's options.

    Raises:
        InputError: one of them holds something that is not replaced, or is what the run reads.
    """
    teacher: tuple[object, ...] = ()
    if (distil := options.distil) is not None:
        teacher = (distil.teacher, distil.teacher_prompt, distil.shots_from)
    sources = (base, data, options.eval_data, *options.packages, options.resume, *teacher)
    for path in prompts:
        check_output(path, PROMPT, sources=sources)
    check_output(
        checkpoint_path(output), CHECKPOINT, sources=(base, data, options.eval_data, *options.packages, *teacher)
    )
    if distil is not None:
        check_output(answers_path(output, options), ANSWERS, sources=sources)
    if options.adapter is not None:
        check_output(options.adapter, ADAPTER, force=True, sources=sources)
    if options.log is not None:
        check_output(options.log, LOG, sources=sources)
        check_output(options.log / METRICS_FILE, METRICS, sources=sources)


def check_inputs(base: object, data: object, options: TuneOptions) -> None:
    """Check what a run reads, as far as that takes no heavy import and loads no model.

    Args:
        base: The base, as it was given.
        data: The data, as it was given.
        options: The run's options.

    Raises:
        SourceError: there is no base at a path.
        DataError: a data file is missing, or its first row cannot be read.
        PackageError: the package to tune for is missing or broken.
        TuningError: there is no checkpoint to go on from.
        PromptFileError: the prompt to start as is broken.
    """
    distil = options.distil
    for given in (base, distil and distil.teacher):
        if isinstance(given, (str, os.PathLike)):
            find_local(given)
    for source in (data, options.eval_data, distil and distil.shots_from):
        if isinstance(source, (str, os.PathLike)) and (Path(source).exists() or Path(source).suffix.lower() in READERS):
            column_names(text_source(source) if distil is not None else source)
    for package in options.packages:
        open_package(package)
    if distil is not None and distil.teacher_prompt is not None:
        load_prompt(distil.teacher_prompt)
    if options.resume is None:
        return
    if options.resume.suffix == ".safetensors":
        load_prompt(options.resume)
        return
    try:
        check_regular(options.resume)
        with ZipFile(options.resume):
            pass
    except (OSError, BadZipFile) as error:
        reason = getattr(error, "strerror", None)
        what = f"{reason}; give the checkpoint" if reason else "no checkpoint of edgeprompt tune; give the file"
        raise TuningError(
            f"cannot go on from {str(options.resume)!r}: {what} that an interrupted run left beside its output"
        ) from error


class TextLines(Sequence[Record]):
    """The lines of a text file as records with the column `text`, streamed anew each time; empty lines are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)

    def __iter__(self) -> Iterator[Record]:
        try:
            with self._path.open("rb") as file:
                yield from (record for record in read_lines(file, self.name) if record["text"].strip())
        except OSError as error:
            raise DataError(f"cannot read {self.name!r}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def text_source(data: DataSource) -> DataSource:
    """The data, of a .txt file its lines."""
    if isinstance(data, (str, os.PathLike)) and Path(data).suffix.lower() == ".txt":
        return TextLines(Path(data))
    return data


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT model as an adapter folder, marked as ours so that a later run may replace it."""
    from safetensors.torch import save_file

    with atomic_folder(folder, ADAPTER, force=True) as temporary:
        model.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)  # a form that PEFT leaves empty
        file = temporary / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata={"format": "pt", names.WRITTEN_BY: "edgeprompt"})
