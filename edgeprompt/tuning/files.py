"""What a run reads and writes: checked before the work; nothing is written over somebody else's file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import safe_open

from edgeprompt import names
from edgeprompt.base.source import find_local
from edgeprompt.errors import TuningError
from edgeprompt.evaluation.data import column_names
from edgeprompt.evaluation.formats import READERS
from edgeprompt.package.files import atomic_folder, check_regular
from edgeprompt.package.folder import open_package
from edgeprompt.package.outputs import ADAPTER, CHECKPOINT, LOG, METRICS, PROMPT, check_output
from edgeprompt.prompts.file import load_prompt
from edgeprompt.tuning.options import TuneOptions, checkpoint_path

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
    sources = (base, data, options.eval_data, options.package, options.resume)
    for path in prompts:
        check_output(path, PROMPT, sources=sources)
    check_output(checkpoint_path(output), CHECKPOINT, sources=(base, data, options.eval_data, options.package))
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
    if isinstance(base, (str, os.PathLike)):
        find_local(base)
    for source in (data, options.eval_data):
        if isinstance(source, (str, os.PathLike)) and (Path(source).exists() or Path(source).suffix.lower() in READERS):
            column_names(source)
    if options.package is not None:
        open_package(options.package)
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
