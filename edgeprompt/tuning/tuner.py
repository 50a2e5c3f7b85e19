"""`tune`: from a base and labelled data to a prompt file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, InputError, TuningError, UnsupportedError
from edgeprompt.evaluation.data import DataSource, data_hash, read_records, source_name
from edgeprompt.package.manifest import Base
from edgeprompt.prompts.file import PromptFile, TunedFor, load_prompt, save_prompt
from edgeprompt.prompts.weights import TUNED_QUALITY, figures
from edgeprompt.tuning.calibration import choose_calibration
from edgeprompt.tuning.examples import BatchPlan, Example, Examples, few_shot, sample, sorted_batches, split
from edgeprompt.tuning.files import check_inputs, check_outputs, save_adapter
from edgeprompt.tuning.loop import Loop, Progress
from edgeprompt.tuning.objectives import WordClassify
from edgeprompt.tuning.options import DEFAULT_STEPS, TuneOptions, checkpoint_path
from edgeprompt.tuning.plan import inspect_data
from edgeprompt.tuning.prepare import Run, prepare

_EVAL_BATCHES = 2
"""Evaluation batches are this many times the training batch: no gradients to keep."""
_CLOSENESS_TEXTS = 8
_LEAST_AGREEMENT, _MOST_DIFFERENCE = 0.5, 0.1
"""Of next tokens, and of logits as a share of their scale: where both are missed, the package is of other weights."""


@dataclass(frozen=True)
class TuneResult:
    """A tuned prompt and what tuning it took."""

    path: Path
    prompt: PromptFile
    steps: int
    best_step: int
    metric: str
    value: float | None
    """The best prompt's metric on the eval data; None without evaluation."""
    examples_per_second: float
    checks: Mapping[str, Any]
    """What else was measured (for a package: how closely training followed its graph)."""
    notes: tuple[str, ...] = ()
    """What was decided about the data that its writer may want to know."""


@dataclass(frozen=True)
class RunData:
    """What a run trains and evaluates on."""

    source: DataSource
    examples: Examples
    indices: Any
    """Which examples to train on, int64."""
    eval_examples: Examples
    eval_batches: Sequence[Sequence[int]]
    fields: Mapping[str, str]
    """The template's fields of one record, for the golden example."""
    notes: tuple[str, ...] = ()


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
        data: `.csv`, `.tsv`, `.jsonl` or `.parquet` file, dataset id (`name:split`), or records in memory.
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
    facts = inspect_data(data, options)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        run = prepare(base, facts, options)
        if options.adapter is not None and run.plan.has_head:
            raise UnsupportedError("a prompt with a head of its own is no PEFT adapter; leave out --adapter")
        found = read_data(run, data)
        if run.package is not None:
            _check_package(run, found)
        loop, batches = make_loop(run, found, path)
        if options.resume is not None:
            _resume(run, loop, options.resume)
        done = loop.run(show=progress)
        prompt = prompt_file(run, loop, done, path, found)
    checks = _closeness(run, found) if run.package is not None else {}
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


def read_data(run: Run, data: DataSource) -> RunData:
    """Tokenise the data, and divide it into training and evaluation."""
    options = run.options
    examples, fields = _encode(run, data)
    notes = []
    if options.eval_data is not None:
        eval_examples, fields = _encode(run, options.eval_data)
        indices, held = np.arange(len(examples)), np.arange(len(eval_examples))
    else:
        eval_examples = examples
        indices, held = split(examples.groups, options.eval_split, options.seed)
        if options.eval_split and (alone := int((np.unique(examples.groups, return_counts=True)[1] == 1).sum())):
            notes.append(f"{alone} classes have one example each, which stays in training: evaluation has none of them")
    if options.shots is not None:
        if run.plan.task != "classify" or run.plan.problem_type != "single_label":
            raise InputError("--shots counts examples per class; it is for --task classify")
        indices = few_shot(indices, examples.groups, options.shots, options.seed)
    held = sample(held, options.eval_limit, options.seed)
    batches = list(sorted_batches(held, eval_examples.lengths, options.batch_size * _EVAL_BATCHES))
    return RunData(data, examples, indices, eval_examples, batches, fields, tuple(notes))


def _encode(run: Run, data: DataSource) -> tuple[Examples, dict[str, str]]:
    """All records of `data` as examples, and the fields of the first."""
    first: dict[str, str] = {}

    def encoded() -> Iterator[Example]:
        for number, record in enumerate(read_records(data), 1):
            where = f"row {number} of {source_name(data)!r}"
            if not first:
                first.update(run.objective.fields(record, where))
            yield run.objective.encode(record, where)

    return Examples(encoded()), first


def make_loop(run: Run, data: RunData, path: Path) -> tuple[Loop, BatchPlan]:
    """The loop that trains `run` on `data`, and the batches that it will see."""
    options = run.options
    batches = BatchPlan(data.indices, data.examples.lengths, options.batch_size, options.seed)
    steps = options.steps or math.ceil((options.epochs or 0) * batches.batches_per_epoch) or DEFAULT_STEPS
    loop = Loop(
        run.objective,
        data.examples,
        batches,
        (data.eval_examples, data.eval_batches),
        options,
        steps=steps,
        checkpoint=checkpoint_path(path),
        signature=_signature(run, data.source, steps),
    )
    return loop, batches


def _signature(run: Run, data: DataSource, steps: int) -> dict[str, Any]:
    """The settings that a checkpoint must share to go on exactly."""
    options = run.options
    return {
        "base": run.fingerprint,
        "data": data_hash(data),
        "eval_data": data_hash(options.eval_data) if options.eval_data is not None else None,
        "template": str(run.plan.template),
        "verbalizer": [[label, list(words)] for label, words in run.plan.verbalizer.items()],
        "labels": list(run.plan.labels),
        "package": run.package.manifest.weights_hash if run.package else None,
        "steps": steps,
        "learning_rate": options.rate,
        **{
            name: getattr(options, name)
            for name in (
                "method", "encoder", "projection", "num_virtual_tokens", "batch_size", "seed", "shots", "max_length",
                "eval_split", "eval_limit", "mixed_precision",
            )
        },
    }  # fmt: skip


def _resume(run: Run, loop: Loop, path: Path) -> None:
    if path.suffix != ".safetensors":
        loop.resume(path)
        return
    prompt, soft = load_prompt(path), run.objective.model.soft
    if not prompt.base.matches(Base(run.loaded.name, run.fingerprint)):
        raise BaseMismatchError(
            f"prompt {str(path)!r} was made for base {prompt.base.name} ({prompt.base.fingerprint}), "
            f"this base is {run.loaded.name} ({run.fingerprint})"
        )
    if soft is None:
        raise InputError("--method head trains no prompt, so it cannot start from a prompt file; leave out --resume")
    tensor = prompt.past_key_values if soft.is_prefix else prompt.prompt_embeddings
    shape = list(soft().shape)
    if tensor is None or list(tensor.shape) != shape:
        found = "no such tensor" if tensor is None else list(tensor.shape)
        raise TuningError(f"cannot start from {str(path)!r}: {run.options.method} needs {shape}, found {found}")
    soft.start_from(torch.from_numpy(tensor.copy()).float().to(loop.accelerator.device))


def prompt_file(run: Run, loop: Loop, progress: Progress, path: Path, data: RunData) -> PromptFile:
    """The best prompt as a prompt file."""
    options, objective, plan, package = run.options, run.objective, run.plan, run.package
    objective.model.eval()
    calibration: tuple[float, ...] = ()
    with torch.no_grad(), loop.accelerator.autocast():
        shared = objective.model.shared()
        if isinstance(objective, WordClassify) and options.calibrate and data.eval_batches:
            calibration = choose_calibration(objective, data.eval_examples, data.eval_batches, shared)
        golden = objective.golden(data.fields, shared, calibration)
    soft = objective.model.soft
    array = soft.array() if soft is not None else None
    deep = soft is not None and soft.is_prefix
    head, tensors = objective.head()
    return PromptFile(
        name=options.name or path.stem,
        method=options.method,
        task=plan.task,
        base=Base(run.loaded.name, run.fingerprint),
        template=plan.template,
        prompt_embeddings=None if deep else array,
        past_key_values=array if deep else None,
        head=tensors,
        head_spec=head,
        verbalizer=plan.verbalizer,
        labels=plan.labels,
        calibration=calibration,
        tokenizer_fingerprint=run.tokenizer.fingerprint,
        generation=plan.generation,
        tuned_for=TunedFor(package.manifest.precision, package.manifest.weights_hash) if package else TunedFor("fp32"),
        training={
            "data": data_hash(data.source),
            "examples": len(data.indices),
            "steps": progress.step,
            "best_step": progress.best_step,
            "metric": {f"eval_{name}": value for name, value in progress.best.items()},
            "eval_examples": sum(len(batch) for batch in data.eval_batches),
            "seed": options.seed,
            "learning_rate": options.rate,
            "batch_size": options.batch_size,
            "init": options.init,
            **({TUNED_QUALITY: figures(package.manifest.quality)} if package and package.manifest.quality else {}),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
        golden=golden,
    )


def _check_package(run: Run, data: RunData) -> None:
    """Refuse a package that computes something else than the model in training, before that is trained."""
    found = _closeness(run, data)
    if not found or found["graph_top1_agreement"] >= _LEAST_AGREEMENT:
        return
    if found["graph_mean_difference"] > _MOST_DIFFERENCE * found["logit_scale"]:
        assert run.package is not None
        raise BaseMismatchError(
            f"package {str(run.package.path)!r} does not compute what {run.loaded.name!r} computes with its weights: "
            f"the next token agrees in {found['graph_top1_agreement']:.0%} of texts; export this base again"
        )


def _closeness(run: Run, data: RunData) -> dict[str, float]:
    """How closely a decoder in training followed the package's graph, on a few texts with the tuned prompt."""
    if run.encoder.architecture != names.DECODER_ONLY:
        return {}
    from edgeprompt.base.dequantize import check_closeness

    assert run.package is not None
    soft = run.objective.model.soft
    batches = data.eval_batches or [data.indices.tolist()]
    source = data.eval_examples if data.eval_batches else data.examples
    some = [source[index].ids for batch in batches for index in batch][:_CLOSENESS_TEXTS]
    found = check_closeness(run.loaded.model, run.package.path, some, None if soft.is_prefix else soft.array())
    return {
        "graph_max_difference": found.max_difference,
        "graph_mean_difference": found.mean_difference,
        "logit_scale": found.logit_scale,
        "graph_top1_agreement": found.top1_agreement,
    }
