"""`tune`: from a base and data to a prompt file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.evaluation.data import DataSource
from edgeprompt.prompts.file import save_prompt
from edgeprompt.tuning.distil import distil
from edgeprompt.tuning.files import check_inputs, check_outputs, save_adapter
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.plan import inspect_data
from edgeprompt.tuning.prepare import prepare
from edgeprompt.tuning.runs import TuneResult, check_packages, closeness, make_loop, prompt_file, read_data, resume


def tune(
    base: Any,
    data: DataSource,
    *,
    output: str | os.PathLike[str],
    options: TuneOptions | None = None,
    progress: bool = True,
) -> TuneResult:
    """Train a soft prompt and write it as a prompt file.

    Args:
        base: Hugging Face id, local folder or `.gguf` file, or an `edgeprompt.base.load.LoadedBase` (tuning for a
            package puts the package's weights into it).
        data: `.csv`, `.tsv`, `.jsonl` or `.parquet` file, dataset id (`name:split`), or records in memory; with
            `options.distil` texts without labels, also a `.txt` file with a text a line.
        output: the prompt file to write; a checkpoint is kept beside it while the run is on.
        options: method, task, sizes and so on.
        progress: whether to show progress on stderr: a bar on a terminal, else a line now and then.

    Returns:
        The prompt, its file and the run's figures.

    Raises:
        DataError: the data is missing, empty, or lacks a column or a verbalizer word.
        SourceError: the base is missing, unknown or unreadable.
        InputError: an output is not replaced (`edgeprompt.package.outputs`).
        BaseMismatchError: the package or the prompt to resume is of another base.
        UnsupportedError: the base cannot do the task or the method.
        TuningError: tuning could not go on.
    """
    options = options or TuneOptions()
    path = Path(output)
    if path.suffix != ".safetensors":
        raise InputError(f"output {str(path)!r} must end in .safetensors")
    check_outputs([path], path, base, data, options)
    check_inputs(base, data, options)
    if options.method == "multitask-prompt-tuning":
        raise InputError("multitask prompt tuning needs tasks: name the column that tells them with --task-column")
    if options.distil is not None:
        return distil(base, data, path, options, progress=progress)
    facts = inspect_data(data, options)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        run = prepare(base, facts, options)
        if options.adapter is not None and run.plan.has_head:
            raise UnsupportedError("a prompt with a head of its own is no PEFT adapter; leave out --adapter")
        found = read_data(run, data, show=progress)
        check_packages(run, found)
        loop, batches = make_loop(run, found, path)
        if options.resume is not None:
            resume(run, loop, options.resume)
        done = loop.run(show=progress)
        with loop.kept():
            prompt = prompt_file(run, loop, done, path, found, show=progress)
    with loop.kept():
        checks = closeness(run, found)
        if loop.accelerator.is_main_process:
            save_prompt(prompt, path)
            if options.adapter is not None:
                save_adapter(run.objective.model.soft.as_peft(run.loaded.model), options.adapter)
    loop.forget_checkpoint()
    loop.accelerator.wait_for_everyone()
    return TuneResult(
        path=path,
        prompt=prompt,
        steps=done.step,
        best_step=done.best_step,
        metric=run.objective.metric,
        value=done.best.get(run.objective.metric),
        examples_per_second=done.step * batches.batch_size / done.seconds if done.seconds else 0.0,
        checks=checks,
        notes=found.notes,
    )
