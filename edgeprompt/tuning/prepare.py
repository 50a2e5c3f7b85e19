"""From a base and a plan to a model that trains: base loaded, prompt built and started, objective chosen."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgeprompt import names
from edgeprompt.errors import CapacityError, InputError, SourceError, UnsupportedError
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Geometry, Tokens
from edgeprompt.package.tokenizer import Tokenizer, naming
from edgeprompt.prompts.template import Template, label_words
from edgeprompt.tuning.causal import CausalPrompt
from edgeprompt.tuning.encoder import EncoderPrompt
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.heads import AnswerSpan, HeadClassify, Tag
from edgeprompt.tuning.objectives import Generate, Objective, WordClassify
from edgeprompt.tuning.options import MAX_LENGTH, TuneOptions
from edgeprompt.tuning.packages import PackageWeights
from edgeprompt.tuning.plan import DataFacts, TaskPlan, make_plan
from edgeprompt.tuning.prompted import Prompted
from edgeprompt.tuning.seq2seq import Seq2SeqPrompt
from edgeprompt.tuning.soft_prompt import SoftPrompt, start_ids

_LOG = logging.getLogger("edgeprompt")
_TASK_TYPES = {
    names.DECODER_ONLY: "CAUSAL_LM",
    names.ENCODER_DECODER: "SEQ_2_SEQ_LM",
    names.ENCODER_ONLY: "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class Run:
    """Everything a run works on."""

    loaded: Any
    """The base (`edgeprompt.base.load.LoadedBase`); with a package, it holds the package's weights."""
    fingerprint: str
    tokenizer: Tokenizer
    plan: TaskPlan
    encoder: RecordEncoder
    objective: Objective
    options: TuneOptions
    weights: PackageWeights
    """The packages that the prompt is tuned for, whose weights the model holds in turn."""
    model: Any
    """The base with its soft prompt; several tasks may share it."""
    tokens: Tokens


def prepare(base: Any, facts: DataFacts, options: TuneOptions, *, num_tasks: int = 1) -> Run:
    """Load the base and build what trains on it; `num_tasks` is for multitask prompt tuning.

    Raises:
        SourceError: the base is missing, unknown or unreadable.
        UnsupportedError: the base cannot do the task or the method.
        PackageError: the package to tune for is missing or broken.
        BaseMismatchError: the package is of another base.
    """
    from edgeprompt.base.geometry import geometry_of, tokens_of
    from edgeprompt.base.load import LoadedBase
    from edgeprompt.base.tokenizer_files import check_tokenizer_files

    check_tokenizer_files(base)
    packages = [open_package(path) for path in options.packages]
    loaded = base if isinstance(base, LoadedBase) else _load(base, packages=bool(packages))
    fingerprint = loaded.fingerprint
    weights = PackageWeights(loaded.model, packages)
    architecture = loaded.family.architecture
    plan = _plan(loaded, facts, options)
    geometry = geometry_of(loaded.config)
    tokenizer = read_tokenizer(loaded, geometry.vocab_size)
    if options.max_length > geometry.max_positions > 0:
        if options.max_length != MAX_LENGTH:
            most = geometry.max_positions
            raise InputError(f"max_length is {options.max_length}, {loaded.name} takes at most {most}")
        options = replace(options, max_length=geometry.max_positions)
    soft = None
    if options.method != "head":
        soft = SoftPrompt(geometry, options, task_type=_TASK_TYPES[architecture], num_tasks=num_tasks)
    count = soft.num_virtual_tokens if soft is not None else 0
    deep = soft is not None and soft.is_prefix and plan.template.prompt_is_prefix
    encoder = RecordEncoder(
        architecture=architecture,
        template=plan.template,
        tokenizer=tokenizer,
        options=options,
        num_virtual_ids=0 if deep else count,
        prefix_length=count if deep else 0,
        vocab_size=geometry.vocab_size,
    )
    tokens = tokens_of(loaded.config, getattr(loaded.model, "generation_config", None), loaded.tokenizer)
    model = prompted(loaded, plan.template, geometry, soft, tokens)
    _start(model, plan, tokenizer, options)
    objective = _objective(loaded.name, model, encoder, plan, tokens)
    return Run(loaded, fingerprint, tokenizer, plan, encoder, objective, options, weights, model, tokens)


def _load(base: Any, *, packages: bool) -> Any:
    """The base in float32 where memory holds it; else a decoder's matrices stay in their files, read at every step."""
    from edgeprompt.base import memory
    from edgeprompt.base.load import load_base

    try:
        return load_base(base)
    except CapacityError:
        if packages:  # their weights are written into the model's
            raise
    loaded = load_base(base, need=memory.to_train, mapped=True)
    _LOG.warning(
        "note: %s does not fit into memory in float32, so its matrices stay in their files and are read at every step",
        loaded.name,
    )
    return loaded


def another_task(run: Run, facts: DataFacts) -> Run:
    """A run on the same base and prompt encoder for another task's data."""
    plan = _plan(run.loaded, facts, run.options)
    encoder = replace(run.encoder, template=plan.template)
    objective = _objective(run.loaded.name, run.model, encoder, plan, run.tokens)
    return replace(run, plan=plan, encoder=encoder, objective=objective)


def _plan(loaded: Any, facts: DataFacts, options: TuneOptions) -> TaskPlan:
    architecture = loaded.family.architecture
    predicts_masks = architecture == names.ENCODER_ONLY and loaded.model is not loaded.model.base_model
    return make_plan(facts, options, architecture=architecture, name=loaded.name, predicts_masks=predicts_masks)


def prompted(loaded: Any, template: Template, geometry: Geometry, soft: Any, tokens: Tokens) -> Any:
    """A base with a prompt (`SoftPrompt`, or what stands for one) in front of or inside its texts.

    Raises:
        SourceError: an encoder-decoder that does not say what its decoder starts with.
    """
    architecture, vocab = loaded.family.architecture, geometry.vocab_size
    if architecture == names.ENCODER_ONLY:
        return EncoderPrompt(loaded, geometry, soft, mask_token=-1 if tokens.mask is None else tokens.mask)
    assert soft is not None
    if architecture == names.ENCODER_DECODER:
        start = tokens.bos if tokens.decoder_start is None else tokens.decoder_start
        if start is None:
            raise SourceError(f"{loaded.name} names no token that its decoder starts with")
        return Seq2SeqPrompt(loaded.model, soft, vocab_size=vocab, start=[start])
    return CausalPrompt(loaded.model, soft, vocab_size=vocab, prompt_leads=template.prompt_is_prefix)


def _objective(name: str, model: Any, encoder: RecordEncoder, plan: TaskPlan, tokens: Tokens) -> Objective:
    if plan.task == "generate":
        if not tokens.eos:
            raise UnsupportedError(f"{name} names no end token, so a generation could not learn to stop")
        whole = encoder.architecture == names.ENCODER_DECODER
        return Generate(model, encoder, end=tokens.eos[0], whole_text=whole)
    if plan.task == "tag":
        return Tag(model, encoder, plan.labels)
    if plan.task == "qa":
        return AnswerSpan(model, encoder, allow_no_answer="allow_no_answer" in plan.generation)
    if plan.has_head:
        return HeadClassify(model, encoder, plan.labels, plan.problem_type)
    return WordClassify(model, encoder, plan.verbalizer)


def read_tokenizer(loaded: Any, vocab_size: int, *, chat: bool = False) -> Tokenizer:
    """The base's tokenizer as a package has it.

    Args:
        loaded: the base.
        vocab_size: rows of its embedding.
        chat: whether its chat template is needed.

    Raises:
        SourceError: the base has no tokenizer.
        UnsupportedError: it has no chat template.
    """
    if loaded.tokenizer is None:
        raise SourceError(f"{loaded.name} has no tokenizer; put its tokenizer files beside the model")
    with tempfile.TemporaryDirectory() as folder:
        loaded.tokenizer.save_pretrained(folder)
        tokenizer = Tokenizer(folder, vocab_size)
        _ = tokenizer.fingerprint  # reads the file, which will be gone
        if chat:
            try:
                tokenizer.chat("")
            except UnsupportedError as error:
                raise UnsupportedError(f"{loaded.name} has no chat template; leave out --chat") from error
        return tokenizer


@torch.no_grad()
def _start(model: Prompted, plan: TaskPlan, tokenizer: Tokenizer, options: TuneOptions) -> None:
    """Set the prompt to what the options say it starts as."""
    soft = model.soft
    if soft is None:
        return
    for label, word in label_words(plan.verbalizer):  # a start may be made of them
        with naming(f"label word {word!r} of label {label!r}"):
            tokenizer.encode(word, add_special_tokens=False)
    words = [word for choices in plan.verbalizer.values() for word in choices] or [f" {label}" for label in plan.labels]
    ids = start_ids(options, tokenizer, model.vocab_size, words, plan.purpose)
    table = model.base.get_input_embeddings()
    target = None
    if soft.is_prefix:
        target = None if ids is None else model.start_prefix(ids)
    elif ids is None:
        target = torch.randn(soft.num_virtual_tokens, table.weight.shape[1]) * table.weight.std().cpu()
    else:
        target = table(torch.tensor(ids, device=table.weight.device))
    if target is not None:
        soft.start_from(target.float())
