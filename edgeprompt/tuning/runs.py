"""The parts of a run: data, loop, prompt file, and how closely training followed a package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprompt import names, progress
from edgeprompt.errors import BaseMismatchError, InputError, TuningError
from edgeprompt.evaluation.data import DataSource, data_hash, read_records, source_name
from edgeprompt.package.manifest import Base
from edgeprompt.progress import Update
from edgeprompt.prompts.file import Golden, PromptFile, TunedFor, load_prompt
from edgeprompt.prompts.weights import TUNED_QUALITY, nearest
from edgeprompt.tuning.calibration import choose_calibration
from edgeprompt.tuning.examples import BatchPlan, Example, Examples, few_shot, sample, sorted_batches, split
from edgeprompt.tuning.loop import Loop, Progress
from edgeprompt.tuning.objectives import CLEAR, GOLDEN_CANDIDATES, Objective, WordClassify, texts_at_once
from edgeprompt.tuning.options import DEFAULT_STEPS, checkpoint_path
from edgeprompt.tuning.prepare import Run

_EVAL_BATCHES = 2
"""Evaluation batches are this many times the training batch: no gradients to keep."""
_TOLD = 64
"""Records between two words on how many were read."""
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
    candidates: Sequence[Mapping[str, str]]
    """The template's fields of the first records, one of which becomes the golden example."""
    notes: tuple[str, ...] = ()


def read_data(run: Run, data: DataSource, *, show: bool = False) -> RunData:
    """Tokenise the data, and divide it into training and evaluation; `show` progress on stderr."""
    options = run.options
    examples, candidates = _encode(run, data, show=show)
    notes = []
    if options.eval_data is not None:
        eval_examples, candidates = _encode(run, options.eval_data, show=show)
        indices, held = np.arange(len(examples)), np.arange(len(eval_examples))
    else:
        eval_examples = examples
        share = options.eval_share(len(examples))
        indices, held = split(examples.groups, share, options.seed)
        if share and (alone := int((np.unique(examples.groups, return_counts=True)[1] == 1).sum())):
            notes.append(f"{alone} classes have one example each, which stays in training: evaluation has none of them")
    if options.shots is not None:
        if run.plan.task != "classify" or run.plan.problem_type != "single_label":
            raise InputError("--shots counts examples per class; it is for --task classify")
        indices = few_shot(indices, examples.groups, options.shots, options.seed)
    held = sample(held, options.eval_limit, options.seed)
    size = texts_at_once(run.objective, options.batch_size * _EVAL_BATCHES)
    batches = list(sorted_batches(held, eval_examples.lengths, size))
    return RunData(data, examples, indices, eval_examples, batches, candidates, tuple(notes))


def _encode(run: Run, data: DataSource, *, show: bool) -> tuple[Examples, list[dict[str, str]]]:
    """All records of `data` as examples, and the fields of the first ones."""
    first: list[dict[str, str]] = []

    def encoded(tell: Update) -> Iterator[Example]:
        for number, record in enumerate(read_records(data), 1):
            where = f"row {number} of {source_name(data)!r}"
            if number <= GOLDEN_CANDIDATES:
                first.append(dict(run.objective.fields(record, where)))
            yield run.objective.encode(record, where)
            if number % _TOLD == 0:
                tell(number, "")

    with progress.show("reading", None, unit="rows", wanted=show) as tell:
        return Examples(encoded(tell)), first


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
        weights=run.weights,
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
        "package": _hashes(run),
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


def resume(run: Run, loop: Loop, path: Path) -> None:
    """Go on from a checkpoint, or start as an existing prompt.

    Raises:
        TuningError: a checkpoint of another run, or a prompt of another shape.
        BaseMismatchError: a prompt of another base.
    """
    if path.suffix != ".safetensors":
        loop.resume(path)
        return
    prompt, soft = load_prompt(path), run.objective.model.soft
    ours = Base(run.loaded.name, run.fingerprint)
    if not prompt.base.matches(ours):
        raise BaseMismatchError(
            f"prompt {str(path)!r} was made for base {prompt.base.name!r} ({prompt.base.brief}), "
            f"this base is {ours.name!r} ({ours.brief}){ours.apart(prompt.base)}"
        )
    if soft is None:
        raise InputError("--method head trains no prompt, so it cannot start from a prompt file; leave out --resume")
    tensor = prompt.past_key_values if soft.is_prefix else prompt.prompt_embeddings
    shape = list(soft().shape)
    if tensor is None or list(tensor.shape) != shape:
        found = "no such tensor" if tensor is None else list(tensor.shape)
        raise TuningError(f"cannot start from {str(path)!r}: {run.options.method} needs {shape}, found {found}")
    if prompt.is_infix != (soft.is_prefix and not run.plan.template.prompt_is_prefix):
        where = "inside" if prompt.is_infix else "in front of"
        raise TuningError(
            f"cannot start from {str(path)!r}: its keys and values stand {where} the text, and --template puts them "
            "elsewhere"
        )
    soft.start_from(torch.from_numpy(tensor.copy()).float().to(loop.accelerator.device))


def _golden(
    objective: Objective, candidates: Sequence[Mapping[str, str]], shared: Any, calibration: Sequence[float]
) -> Golden:
    """The first example with a clear answer, which another processor's rounding does not change; else the clearest."""
    found: list[tuple[float, Golden]] = []
    for fields in candidates[: texts_at_once(objective, len(candidates))]:  # fewer where there are many label words
        golden = objective.golden(fields, shared, calibration)
        found.append((_margin(golden, calibration), golden))
        if found[-1][0] >= CLEAR:
            break
    return max(found, key=lambda one: one[0])[1]


def _margin(golden: Golden, calibration: Sequence[float]) -> float:
    """How far the best label's or first token's logit lies above the next; infinite where nothing is compared so."""
    values = [*golden.logits.values()]
    if len(values) < 2 or not (golden.token_ids or golden.label in golden.logits):
        return math.inf
    if len(calibration) == len(values):
        values = [value - shift for value, shift in zip(values, calibration, strict=True)]
    second, first = sorted(values)[-2:]
    return first - second


def prompt_file(run: Run, loop: Loop, done: Progress, path: Path, data: RunData, *, show: bool = False) -> PromptFile:
    """The best prompt as a prompt file; `show` progress of its calibration on stderr."""
    options, objective, plan, packages = run.options, run.objective, run.plan, run.weights.packages
    objective.model.eval()
    run.weights.use(0)
    calibration: tuple[float, ...] = ()
    with torch.no_grad(), loop.accelerator.autocast():
        shared = objective.model.shared()
        if isinstance(objective, WordClassify) and options.calibrate and data.eval_batches:
            batches = data.eval_batches
            shown = show and loop.accelerator.is_main_process
            with progress.show("calibrating", len(batches), unit="batches", wanted=shown) as tell:
                calibration = choose_calibration(objective, data.eval_examples, batches, shared, tell)
        golden = _golden(objective, data.candidates, shared, calibration)
    soft = objective.model.soft
    array = soft.array() if soft is not None else None
    deep = soft is not None and soft.is_prefix
    head, tensors = objective.head()
    tuned = tuple(TunedFor(one.manifest.precision, one.manifest.weights_hash) for one in packages)
    tuned = tuned or (TunedFor("fp32"),)
    quality = nearest(one.manifest.quality for one in packages)
    return PromptFile(
        name=options.name or path.stem,
        method=options.method,
        task=plan.task,
        base=Base(run.loaded.name, run.fingerprint),
        template=plan.template,
        prompt_embeddings=None if deep else array,
        past_key_values=array if deep else None,
        is_infix=deep and not plan.template.prompt_is_prefix,
        head=tensors,
        head_spec=head,
        verbalizer=plan.verbalizer,
        labels=plan.labels,
        calibration=calibration,
        tokenizer_fingerprint=run.tokenizer.fingerprint,
        generation=plan.generation,
        tuned_for=tuned[0] if len(tuned) == 1 else tuned,
        training={
            "data": data_hash(data.source),
            "examples": len(data.indices),
            "steps": done.step,
            "best_step": done.best_step,
            **({"averaged_steps": done.averaged} if done.keeps_average else {}),
            "metric": {f"eval_{name}": value for name, value in done.best.items()},
            "eval_examples": sum(len(batch) for batch in data.eval_batches),
            "seed": options.seed,
            "learning_rate": options.rate,
            "batch_size": options.batch_size,
            "init": options.init,
            **({TUNED_QUALITY: quality} if quality else {}),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
        golden=golden,
    )


def check_packages(run: Run, data: RunData) -> None:
    """Refuse a package that computes something else than the model in training, before that is trained.

    Raises:
        BaseMismatchError: names the package.
    """
    for index, package in enumerate(run.weights.packages):
        found = _closeness(run, data, index)
        if not found or found["graph_top1_agreement"] >= _LEAST_AGREEMENT:
            continue
        if found["graph_mean_difference"] > _MOST_DIFFERENCE * found["logit_scale"]:
            raise BaseMismatchError(
                f"package {str(package.path)!r} does not compute what {run.loaded.name!r} computes with its weights: "
                f"the next token agrees in {found['graph_top1_agreement']:.0%} of texts; export this base again"
            )


def closeness(run: Run, data: RunData) -> dict[str, Any]:
    """How closely a decoder in training followed each package's graph; of several by the package's folder."""
    packages = run.weights.packages
    found = [_closeness(run, data, index) for index in range(len(packages))]
    run.weights.use(0)
    if len(packages) == 1:
        return dict(found[0])
    return {str(package.path): one for package, one in zip(packages, found, strict=True) if one}


def _closeness(run: Run, data: RunData, index: int) -> dict[str, float]:
    """On a few texts with the tuned prompt."""
    if run.encoder.architecture != names.DECODER_ONLY:
        return {}
    from edgeprompt.base.dequantize import check_closeness

    run.weights.use(index)
    soft = run.objective.model.soft
    batches = data.eval_batches or [data.indices.tolist()]
    source = data.eval_examples if data.eval_batches else data.examples
    some = [source[index].ids for batch in batches for index in batch][:_CLOSENESS_TEXTS]
    rows = None if soft.is_prefix else soft.array()
    if soft.is_prefix:  # the texts alone are compared, without keys and values
        some = [[token for token in ids if token < run.encoder.vocab_size] for ids in some]
    found = check_closeness(run.loaded.model, run.weights.packages[index].path, some, rows)
    return {
        "graph_max_difference": found.max_difference,
        "graph_mean_difference": found.mean_difference,
        "logit_scale": found.logit_scale,
        "graph_top1_agreement": found.top1_agreement,
    }


def _hashes(run: Run) -> Any:
    """What tells the packages' weights from others."""
    hashes = [package.manifest.weights_hash for package in run.weights.packages]
    return hashes if len(hashes) > 1 else hashes[0] if hashes else None
