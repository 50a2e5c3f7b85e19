"""P-Tuning v2 checkpoints (THUDM/P-tuning-v2, and ChatGLM's): a prefix encoder inside a whole model's state_dict."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeprompt.errors import BaseMismatchError, SourceError, UnsupportedError
from edgeprompt.prompts.file import Head, HeadStep
from exporters.heads import PROBLEMS
from exporters.importers.base_weights import LEFT_OUT, check_copy
from exporters.importers.configs import check_base_sizes, check_count
from exporters.importers.foreign import (
    Array,
    BaseFacts,
    ForeignPrompt,
    ReadOptions,
    as_prefix,
    need_base,
    prefix_sizes,
    prompt_name,
)
from exporters.importers.reading import PICKLES, Contents, is_there, peek, read_checkpoint, read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONFIG = "config.json"

_PREFIX = re.compile(r"(?:^|\.)prefix_encoder\.(embedding\.weight|trans\.[02]\.(?:weight|bias)|weight)$")
_HEAD = re.compile(r"^(classifier|qa_outputs)\.(weight|bias)$")
_POOLER = re.compile(r"^\w+\.(pooler\.dense\.(?:weight|bias))$")
_BASE = re.compile(
    r"^(?:bert|roberta|deberta|albert|electra|distilbert|transformer|model|gpt2|lm_head)"
    r"\.(?!.*(?:adapter|lora_|ia3_|prompt|prefix|soft|delta))"
)
"""The frozen base's own weights, without what other methods train inside it."""
_TASKS = {"SequenceClassification": "classify", "TokenClassification": "tag", "QuestionAnswering": "qa"}


def recognises(source: Path, contents: Contents) -> bool:
    """A checkpoint, or its folder, with a prefix_encoder."""
    file = _file(source)
    found = contents if file == source else peek(file) if file else Contents()
    return any(_PREFIX.search(name) for name in found.tensors)


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """The prefix, projected where the checkpoint projects it, and the head."""
    file = _file(source)
    if file is None:
        raise SourceError(f"{str(source)!r} has neither {' nor '.join(WEIGHTS)}")
    checkpoint = read_checkpoint(
        file, lambda name: bool(_PREFIX.search(name) or _HEAD.search(name) or _POOLER.search(name))
    )
    tensors = checkpoint.tensors
    parts = {match[1]: tensor for name, tensor in tensors.items() if (match := _PREFIX.search(name))}
    if len(parts) != sum(bool(_PREFIX.search(name)) for name in tensors):
        raise SourceError(f"{file.name} has two prefix encoders; save the file with one of them")
    if "embedding.weight" not in parts:
        if "weight" in parts:
            raise UnsupportedError(
                f"{file.name} is of a ...PromptFor... model, which adds positions and normalises its prompt twice; "
                "no serving runtime computes that: train with --prefix, or prompt tuning in PEFT"
            )
        raise SourceError(f"{file.name} has no prefix_encoder.embedding.weight")
    checkpoint.account(lambda name: bool(_BASE.search(name)), "P-Tuning v2")
    rows, projected = _projected(parts, file.name)
    config = _config(file)
    _check_config(config, len(rows), projected, file.name)
    if projected:
        check_count(config.get("prefix_hidden_size"), len(parts["trans.0.weight"]), CONFIG, "prefix_hidden_size")
    facts = need_base(base, "a P-Tuning v2 checkpoint", "its rows say nothing of layers and heads")
    check_base_sizes(config, facts, CONFIG)
    if config.get("model_type") not in (None, facts.model_type):
        raise BaseMismatchError(
            f"{CONFIG} says model_type {config['model_type']!r}; base {facts.base.name} is {facts.model_type!r}"
        )
    layers, heads = prefix_sizes(facts)
    prompt = ForeignPrompt(
        prompt_name(source),
        "p-tuning-v2",
        past_key_values=as_prefix(rows, "prefix_encoder", layers, heads, facts),
        source={"format": "p-tuning-v2"},
        found=(f"prefix of {len(rows)} tokens{', projected by its MLP' if projected else ''}",),
        notes=(
            *((LEFT_OUT,) if any(_name_in_base(name) for name in checkpoint.names) else ()),
            *check_copy(checkpoint, facts, _name_in_base, "P-Tuning v2"),
        ),
    )
    return [_with_head(prompt, tensors, config)]


def _name_in_base(name: str) -> str | None:
    """The pooler is no copy: it travels with the prompt."""
    return name if _BASE.search(name) and not _POOLER.search(name) else None


def _file(source: Path) -> Path | None:
    if source.is_dir():
        return next((source / name for name in WEIGHTS if is_there(source / name)), None)
    return source if source.suffix in (*PICKLES, ".safetensors") else None


def _projected(parts: Mapping[str, Array], file: str) -> tuple[Array, bool]:
    rows = parts["embedding.weight"]
    if not any(name.startswith("trans.") for name in parts):
        return rows, False
    needed = [f"trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
    missing = [name for name in needed if name not in parts]
    if missing:
        raise SourceError(f"{file} projects its prefix, and lacks prefix_encoder.{missing[0]}")
    return project(rows, *(parts[name] for name in needed), name="prefix_encoder"), True


def _config(file: Path) -> dict[str, Any]:
    """The config that the trainer writes beside the weights; empty where there is none."""
    beside = file.with_name(CONFIG)
    return read_json(beside) if is_there(beside) else {}


def _check_config(config: Mapping[str, Any], rows: int, projected: bool, file: str) -> None:
    for name, found in (("pre_seq_len", rows), ("prefix_projection", projected)):
        said = config.get(name, found)
        if said != found:
            raise SourceError(f"config.json says {name} {said!r}, and the tensors in {file} say {found!r}")


def _task_of(config: Mapping[str, Any]) -> str | None:
    """The task that the config's class is for, None where it names no class with a head."""
    classes = config.get("architectures")
    said = str(classes[0]) if isinstance(classes, list) and classes else ""
    return next((task for ending, task in _TASKS.items() if said.endswith(f"For{ending}")), None)


def project(rows: Array, first: Array, first_bias: Array, second: Array, second_bias: Array, *, name: str) -> Array:
    """Linear, tanh, linear: the reparameterisation of prefix tuning (Li and Liang 2021) in P-Tuning v2 and OpenPrompt.

    Raises:
        SourceError: shapes that do not fit each other.
    """
    fits = rows.ndim == first.ndim == second.ndim == 2 and rows.shape[1] == first.shape[1]
    if not fits or second.shape[1] != len(first) or first_bias.shape != first.shape[:1]:
        fits = False
    if not fits or second_bias.shape != second.shape[:1]:
        raise SourceError(
            f"{name}: rows {list(rows.shape)}, first layer {list(first.shape)} and second layer {list(second.shape)} "
            "do not fit each other"
        )
    wide = [tensor.astype(np.float32) for tensor in (rows, first, first_bias, second, second_bias)]
    hidden = np.tanh(wide[0] @ wide[1].T + wide[2])
    return np.asarray(hidden @ wide[3].T + wide[4], np.float32)


def _with_head(prompt: ForeignPrompt, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> ForeignPrompt:
    """Classification heads read the pooled first token; question answering and tagging read every token.

    The repository's classes for sequences and for tokens both call their head `classifier`. Only a sequence
    classifier's model has a pooler, so a pooler in the checkpoint decides, and must not contradict the config. The
    pooler travels with the prompt: RoBERTa bases have none of their own, and the checkpoint's was frozen at its random
    start.
    """
    head = {name: tensor for name, tensor in tensors.items() if _HEAD.search(name)}
    pooler = {match[1]: tensor for name, tensor in tensors.items() if (match := _POOLER.search(name))}
    said = _task_of(config)
    if not head:
        labels = config.get("id2label")
        if said is not None or labels:
            raise SourceError(
                f"config.json says that the checkpoint of {prompt.name!r} is for "
                f"{said or 'classification'}{f' with {len(labels)} labels' if labels else ''}, and it holds no head "
                "(classifier.* or qa_outputs.*); save the whole model again"
            )
        return prompt
    found = "qa" if "qa_outputs.weight" in head else "classify" if pooler else "tag"
    if said is not None and said != found:
        raise SourceError(
            f"config.json says that the checkpoint of {prompt.name!r} is for {said}, and its tensors "
            f"({', '.join([*head, *pooler])}) are those of a model for {found}; save the whole model again"
        )
    shapes = (f"{name} {list(tensor.shape)}" for name, tensor in {**pooler, **head}.items())
    prompt = dataclasses.replace(prompt, found=(*prompt.found, *shapes))
    wanted = {f"{'qa_outputs' if found == 'qa' else 'classifier'}.{part}" for part in ("weight", "bias")}
    if set(head) != wanted:
        raise SourceError(
            f"the checkpoint's head has {', '.join(sorted(head))}; {', '.join(sorted(wanted))} are needed"
        )
    if found == "qa":
        return dataclasses.replace(
            prompt, task="qa", head=head, head_spec=Head("tokens", (HeadStep("linear", "qa_outputs"),))
        )
    classes, labels = head["classifier.weight"].shape[0], config.get("id2label")
    if isinstance(labels, dict) and len(labels) != classes:
        raise SourceError(f"config.json has {len(labels)} labels, and classifier.weight {classes} classes")
    if not pooler:
        spec = Head("tokens", (HeadStep("linear", "classifier"),))
        return dataclasses.replace(prompt, task="tag", head=head, head_spec=spec)
    if set(pooler) != {"pooler.dense.weight", "pooler.dense.bias"}:
        raise SourceError(f"the checkpoint's pooler has only {', '.join(pooler)}")
    steps = (HeadStep("linear", "pooler.dense"), HeadStep("tanh"), HeadStep("linear", "classifier"))
    problem = PROBLEMS.get(str(config.get("problem_type")), "regression" if classes == 1 else "single_label")
    return dataclasses.replace(
        prompt, task="classify", head={**pooler, **head}, head_spec=Head("first", steps, problem)
    )
