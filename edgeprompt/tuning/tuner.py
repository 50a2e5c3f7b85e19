"""`tune`: from a base and labelled data to a prompt file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from edgeprompt.data import DataSource, data_hash, read_rows, source_name
from edgeprompt.errors import BaseMismatchError, InputError, SourceError, TuningError, UnsupportedError
from edgeprompt.manifest import Base, Geometry
from edgeprompt.package import Package, open_package
from edgeprompt.prompt_file import Golden, PromptFile, TunedFor, load_prompt, save_prompt
from edgeprompt.tokenizer import Tokenizer
from edgeprompt.tuning.calibration import choose_calibration
from edgeprompt.tuning.causal import CausalPrompt, check_embedding
from edgeprompt.tuning.examples import BatchPlan, Example, Examples, few_shot, sample, sorted_batches, split
from edgeprompt.tuning.loop import Loop, Progress
from edgeprompt.tuning.objectives import CausalClassify, CausalGenerate, Encoder
from edgeprompt.tuning.options import DEFAULT_STEPS, TuneOptions, checkpoint_path
from edgeprompt.tuning.plan import TaskPlan, make_plan
from edgeprompt.tuning.soft_prompt import SoftPrompt, start_ids

_EVAL_BATCHES = 2
"""Evaluation batches are this many times the training batch: no gradients to keep."""
_CLOSENESS_TEXTS = 8


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


@dataclass(frozen=True)
class _Run:
    """Everything a run works on."""

    base: Any
    fingerprint: str
    geometry: Geometry
    tokenizer: Tokenizer
    plan: TaskPlan
    encoder: Encoder
    objective: CausalClassify | CausalGenerate
    options: TuneOptions


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
        base: Hugging Face id, local folder or `.gguf` file, or an `exporters.load.LoadedBase` (tuning for a package
            puts the package's weights into it).
        data: `.csv`, `.tsv`, `.jsonl` or `.parquet` file, dataset id (`name:split`), or rows in memory.
        output: the prompt file to write; a checkpoint is kept beside it while the run is on.
        options: method, task, sizes and so on.
        progress: whether to show a bar on stderr, where that is a terminal.

    Returns:
        The prompt, its file and the run's figures.

    Raises:
        DataError: the data is missing, empty, or lacks a column or a verbalizer word.
        SourceError: the base is missing, unknown or unreadable.
        BaseMismatchError: the package or the prompt to resume is of another base.
        TuningError: tuning could not go on.
    """
    options = options or TuneOptions()
    path = Path(output)
    if path.suffix != ".safetensors":
        raise InputError(f"output {str(path)!r} must end in .safetensors")
    plan = make_plan(data, options)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        run, package = _prepare(base, plan, options)
        return _train(run, package, data, path, progress)


def _prepare(base: Any, plan: TaskPlan, options: TuneOptions) -> tuple[_Run, Package | None]:
    from exporters.geometry import geometry_of
    from exporters.load import LoadedBase, load_base

    package = open_package(options.package) if options.package is not None else None
    loaded = base if isinstance(base, LoadedBase) else load_base(base)
    if not hasattr(loaded.model, "lm_head") and loaded.model.get_output_embeddings() is None:
        raise UnsupportedError(f"{loaded.name} has no output layer over the vocabulary; tune needs a causal LM")
    fingerprint = loaded.fingerprint
    if package is not None:
        from exporters.dequantize import load_package_weights

        load_package_weights(loaded.model, package.path)
    geometry = geometry_of(loaded.config)
    tokenizer = _tokenizer(loaded)
    soft = SoftPrompt(loaded.model, geometry, options, task_type="CAUSAL_LM")
    if not soft.is_prefix:
        check_embedding(loaded.model, geometry.hidden_size)
    virtual = 0 if soft.is_prefix else options.num_virtual_tokens
    if options.max_length > geometry.max_positions > 0:
        raise InputError(f"max_length is {options.max_length}, {loaded.name} takes at most {geometry.max_positions}")
    encoder = Encoder(plan.template, tokenizer, options, virtual=virtual, vocab_size=geometry.vocab_size)
    model = CausalPrompt(
        loaded.model, soft, vocab_size=geometry.vocab_size, prompt_leads=plan.template.prompt_is_prefix
    )
    _start(model, plan, tokenizer, geometry, options)
    objective: CausalClassify | CausalGenerate
    if plan.task == "classify":
        objective = CausalClassify(model, encoder, plan.verbalizer)
    elif plan.task == "generate":
        objective = CausalGenerate(model, encoder, _end_token(loaded))
    else:
        raise UnsupportedError(f"task {plan.task!r} needs an encoder-only base; {loaded.name} is a decoder")
    return _Run(loaded, fingerprint, geometry, tokenizer, plan, encoder, objective, options), package


def _train(run: _Run, package: Package | None, data: DataSource, path: Path, show: bool) -> TuneResult:
    options, objective = run.options, run.objective
    examples, sample_fields = _encode(run, data)
    held_examples = examples
    if options.eval_data is not None:
        held_examples, sample_fields = _encode(run, options.eval_data)
        indices, held = split(len(examples), 0.0, options.seed)[0], split(len(held_examples), 0.0, options.seed)[0]
    else:
        indices, held = split(len(examples), options.eval_split, options.seed)
    if options.shots is not None:
        if run.plan.task != "classify":
            raise InputError("--shots counts examples per class; it is for --task classify")
        indices = few_shot(indices, examples.classes, options.shots, options.seed)
    held = sample(held, options.eval_limit, options.seed)
    batches = BatchPlan(indices, examples.lengths, options.batch_size, options.seed)
    steps = options.steps or math.ceil((options.epochs or 0) * batches.batches_per_epoch) or DEFAULT_STEPS
    evaluation = list(sorted_batches(held, held_examples.lengths, options.batch_size * _EVAL_BATCHES))
    loop = Loop(
        objective,
        examples,
        batches,
        (held_examples, evaluation),
        options,
        steps=steps,
        checkpoint=checkpoint_path(path),
        signature=_signature(run, data, steps),
    )
    if options.resume is not None:
        _resume(run, loop, options.resume)
    progress = loop.run(show=show)
    prompt = _finish(
        run, package, loop, progress, path, (data, len(indices)), (held_examples, evaluation), sample_fields
    )
    checks = _closeness(run, package, held_examples, evaluation or [indices.tolist()]) if package is not None else {}
    if loop.accelerator.is_main_process:
        save_prompt(prompt, path)
        if options.adapter is not None:
            objective.model.soft.peft.save_pretrained(str(options.adapter))
    loop.forget_checkpoint()
    done = progress.step * batches.batch_size
    return TuneResult(
        path=path,
        prompt=prompt,
        steps=progress.step,
        best_step=progress.best_step,
        metric=objective.metric,
        value=progress.best.get(objective.metric),
        examples_per_second=done / progress.seconds if progress.seconds else 0.0,
        checks=checks,
    )


def _encode(run: _Run, data: DataSource) -> tuple[Examples, dict[str, str]]:
    """All rows of `data` as examples, and the fields of the first."""
    first: dict[str, str] = {}

    def encoded() -> Iterator[Example]:
        for number, row in enumerate(read_rows(data), 1):
            where = f"row {number} of {source_name(data)!r}"
            if not first:
                first.update(run.encoder.fields(row, where))
            yield run.objective.encode(row, where)

    return Examples(encoded()), first


def _closeness(run: _Run, package: Package, examples: Examples, batches: list[list[int]]) -> dict[str, float]:
    """How closely the model in training followed the package's graph, on a few texts with the tuned prompt."""
    from exporters.dequantize import check_closeness

    soft = run.objective.model.soft
    some = [examples[index].ids for batch in batches for index in batch][:_CLOSENESS_TEXTS]
    found = check_closeness(run.base.model, package.path, some, None if soft.is_prefix else soft.array())
    return {
        "graph_max_difference": found.max_difference,
        "graph_mean_difference": found.mean_difference,
        "logit_scale": found.logit_scale,
        "graph_top1_agreement": found.top1_agreement,
    }


def _tokenizer(loaded: Any) -> Tokenizer:
    if loaded.tokenizer is None:
        raise SourceError(f"{loaded.name} has no tokenizer; put its tokenizer files beside the model")
    with tempfile.TemporaryDirectory() as folder:
        loaded.tokenizer.save_pretrained(folder)
        return Tokenizer(folder)


def _end_token(loaded: Any) -> int:
    from exporters.geometry import tokens_of

    found = tokens_of(loaded.config, getattr(loaded.model, "generation_config", None), loaded.tokenizer).eos
    if not found:
        raise UnsupportedError(f"{loaded.name} names no end token, so a generation could not learn to stop")
    return found[0]


def _start(model: CausalPrompt, plan: TaskPlan, tokenizer: Tokenizer, geometry: Geometry, options: TuneOptions) -> None:
    words = [word for choices in plan.verbalizer.values() for word in choices]
    ids = start_ids(options, tokenizer, geometry.vocab_size, words, plan.purpose)
    embedding, soft = model.base.get_input_embeddings(), model.soft
    with torch.no_grad():
        if ids is not None:
            target = embedding(torch.tensor(ids, device=model.base.device)).float()
            if soft.is_prefix:
                layers = model.keys_values(target.to(model.base.dtype))
                target = torch.stack([torch.stack([key[0], value[0]]) for key, value in layers]).float()
            soft.start_from(target)
        elif not soft.is_prefix:
            soft.start_from(torch.randn(soft.num_virtual_tokens, geometry.hidden_size) * embedding.weight.std())


def _signature(run: _Run, data: DataSource, steps: int) -> dict[str, Any]:
    """The settings that a checkpoint must share to go on exactly."""
    options = run.options
    return {
        "base": run.fingerprint,
        "data": data_hash(data),
        "eval_data": data_hash(options.eval_data) if options.eval_data is not None else None,
        "template": str(run.plan.template),
        "verbalizer": [[label, list(words)] for label, words in run.plan.verbalizer.items()],
        "package": str(options.package),
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


def _resume(run: _Run, loop: Loop, path: Path) -> None:
    if path.suffix != ".safetensors":
        loop.resume(path)
        return
    prompt = load_prompt(path)
    if prompt.base.fingerprint != run.fingerprint:
        raise BaseMismatchError(
            f"prompt {str(path)!r} was made for base {prompt.base.name} ({prompt.base.fingerprint}), "
            f"this base is {run.base.name} ({run.fingerprint})"
        )
    soft = run.objective.model.soft
    tensor = prompt.past_key_values if soft.is_prefix else prompt.prompt_embeddings
    shape = list(soft().shape)
    if tensor is None or list(tensor.shape) != shape:
        found = "no such tensor" if tensor is None else list(tensor.shape)
        raise TuningError(f"cannot start from {str(path)!r}: {run.options.method} needs {shape}, found {found}")
    soft.start_from(torch.from_numpy(tensor.copy()).float().to(loop.accelerator.device))


def _finish(
    run: _Run,
    package: Package | None,
    loop: Loop,
    progress: Progress,
    path: Path,
    trained_on: tuple[DataSource, int],
    evaluation: tuple[Examples, list[list[int]]],
    fields: Mapping[str, str],
) -> PromptFile:
    """The best prompt as a prompt file."""
    options, objective, plan = run.options, run.objective, run.plan
    objective.model.eval()
    calibration: tuple[float, ...] = ()
    golden = None
    with torch.no_grad(), loop.accelerator.autocast():
        shared = objective.shared()
        if isinstance(objective, CausalClassify):
            if options.calibrate and evaluation[1]:
                calibration = choose_calibration(objective, *evaluation, shared)
            scores = objective.scores([objective.text_ids(fields)], shared)[0].double().cpu()
            adjusted = scores - torch.tensor(calibration, dtype=torch.float64) if calibration else scores
            golden = Golden(
                fields=dict(fields),
                label=objective.labels[int(adjusted.argmax())],
                logits=dict(zip(objective.labels, scores.tolist(), strict=True)),
            )
        else:
            golden = _golden_generation(objective, run.encoder.ids(fields), fields, shared)
    array = objective.model.soft.array()
    is_prefix = objective.model.soft.is_prefix
    source, count = trained_on
    return PromptFile(
        name=options.name or path.stem,
        method=options.method,
        task=plan.task,
        base=Base(run.base.name, run.fingerprint),
        template=plan.template,
        prompt_embeddings=None if is_prefix else array,
        past_key_values=array if is_prefix else None,
        verbalizer=plan.verbalizer,
        labels=tuple(plan.verbalizer),
        calibration=calibration,
        tokenizer_fingerprint=run.tokenizer.fingerprint,
        tuned_for=TunedFor(package.manifest.precision, package.manifest.weights_hash) if package else TunedFor("fp32"),
        training={
            "data": data_hash(source),
            "examples": count,
            "steps": progress.step,
            "best_step": progress.best_step,
            "metric": {f"eval_{name}": value for name, value in progress.best.items()},
            "eval_examples": sum(len(batch) for batch in evaluation[1]),
            "seed": options.seed,
            "learning_rate": options.rate,
            "batch_size": options.batch_size,
            "init": options.init,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
        golden=golden,
    )


def _golden_generation(
    objective: CausalGenerate, ids: list[int], fields: Mapping[str, str], shared: Any, count: int = 8
) -> Golden:
    """The first tokens of the greedy answer, and the five best logits of the first."""
    made: list[int] = []
    first: dict[str, float] = {}
    for _ in range(count):
        logits = objective.model.logits([[*ids, *made]], [[len(ids) + len(made) - 1]], shared)[0].float()
        if not first:
            best = logits.topk(min(5, len(logits)))
            first = {str(int(token)): float(value) for token, value in zip(best.indices, best.values, strict=True)}
        made.append(int(logits.argmax()))
        if made[-1] == objective.end:
            break
    return Golden(fields=dict(fields), token_ids=tuple(made), logits=first)
