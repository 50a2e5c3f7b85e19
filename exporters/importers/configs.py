"""What a tool's own config says of a prompt, compared with the tensors and with the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, MissingDependencyError, SourceError
from edgeprompt.package.files import read_regular
from exporters.importers.foreign import BaseFacts
from exporters.importers.reading import is_there

MAX_BYTES = 1 << 20
OPENPROMPT = "config.yaml"
_SIZES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
}
"""Sizes of a base, and what configs call them."""
_KINDS = {
    "new_embedding.weight": ("ptuning_template",),
    "soft_embeds": ("soft_template",),
    "soft_embedding.weight": ("mixed_template",),
    "decoder_wte.weight": ("prefix_template", "prefix_tuning_template"),
    "wte.weight": ("prefix_template", "prefix_tuning_template"),
}
"""OpenPrompt's names of the templates that have each tensor."""


def read_yaml(data: bytes, where: str) -> Mapping[str, Any]:
    """A foreign YAML file of plain values.

    Raises:
        SourceError: it is none.
        MissingDependencyError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(f"{where} is a YAML file: pip install 'edgeprompt[export]'") from error

    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SourceError(f"{where} is no YAML of plain values: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, Mapping):
        raise SourceError(f"{where} must hold names and values, found {type(found).__name__}")
    return found


def yaml_beside(file: Path, name: str) -> tuple[Mapping[str, Any], str] | None:
    """The YAML file of that name in a checkpoint's folder, and what to call it; None where there is none.

    Raises:
        SourceError: it cannot be read.
    """
    beside = file.with_name(name)
    if not is_there(beside):
        return None
    try:
        return read_yaml(read_regular(beside, MAX_BYTES), str(beside)), str(beside)
    except OSError as error:
        raise SourceError(f"cannot read {str(beside)!r}: {error.strerror or error}") from error


def check_count(said: Any, found: int, where: str, what: str) -> None:
    """Refuse a number in a config that is not the tensor's; a config that says nothing is right.

    Raises:
        SourceError: names both.
    """
    if said is not None and said != found:
        raise SourceError(f"{where} says {what} {said!r}, its tensors {found}; one of them is of another prompt")


def check_base_sizes(config: Mapping[str, Any], base: BaseFacts | None, where: str) -> None:
    """Refuse a config whose layers, heads or hidden size are not the base's.

    Raises:
        BaseMismatchError: names the first.
    """
    if base is None:
        return
    for name, aliases in _SIZES.items():
        if name == "num_layers" and base.architecture == names.ENCODER_DECODER:
            continue  # which has two numbers of layers
        own = getattr(base.geometry, name)
        for alias in aliases:
            said = config.get(alias)
            if isinstance(said, int) and not isinstance(said, bool) and said != own:
                raise BaseMismatchError(f"{where} says {alias} {said}; base {base.base.name} has {own}")


def check_nemo(
    config: Mapping[str, Any], tasks: Mapping[str, Sequence[int]], named: bool, base: BaseFacts | None, where: str
) -> Mapping[str, str]:
    """Compare NeMo's model_config.yaml with its tables.

    Args:
        config: The file.
        tasks: Task -> shape of its table.
        named: Whether the checkpoint says what the tasks are called.
        base: The base.
        where: What to call the file.

    Returns:
        Task -> the template that the file gives it.

    Raises:
        SourceError: other numbers of virtual tokens, another width, or tables of other tasks.
        BaseMismatchError: sizes of another base.
    """
    frozen = config.get("frozen_model")
    for part in (config, frozen) if isinstance(frozen, Mapping) else (config,):
        width = part.get("hidden_size")
        for shape in tasks.values():
            check_count(width, shape[-1], where, "hidden_size")
        if "hidden_size" in part:  # else these are sizes of the prompt's encoder
            check_base_sizes(part, base, where)
    listed = config.get("task_templates")
    entries = {
        str(entry.get("taskname")): entry
        for entry in (listed if isinstance(listed, Sequence) and not isinstance(listed, str) else ())
        if isinstance(entry, Mapping)
    }
    if not named and len(tasks) == len(entries) == 1:
        entries = dict(zip(tasks, entries.values(), strict=True))
    elif not named:
        return {}
    wanted = {str(task) for key in ("existing_tasks", "new_tasks") for task in config.get(key) or ()}
    if lost := sorted(wanted - tasks.keys()):
        raise SourceError(f"{where} names task {lost[0]!r}, and the tables are of {', '.join(tasks)}")
    if entries and (extra := sorted(tasks.keys() - entries.keys())):
        raise SourceError(f"{where} has templates for {', '.join(entries)}, and a table is of task {extra[0]!r}")
    for task, entry in entries.items():
        if task not in tasks:
            continue
        rows = tasks[task][0]
        check_count(entry.get("total_virtual_tokens"), rows, where, f"total_virtual_tokens of task {task!r}")
        splits = entry.get("virtual_token_splits")
        if isinstance(splits, Sequence) and splits and all(isinstance(one, int) for one in splits):
            check_count(sum(splits), rows, where, f"virtual_token_splits of task {task!r} that make")
    return {task: str(entry["prompt_template"]) for task, entry in entries.items() if entry.get("prompt_template")}


def check_openprompt(file: Path, kind: str, parts: Mapping[str, Any], base: BaseFacts | None) -> None:
    """Compare the config.yaml of OpenPrompt's trainer with a checkpoint; where there is none, nothing is compared.

    Args:
        file: The checkpoint, beside the config or in its folder `checkpoints`.
        kind: The tensor that tells the template.
        parts: The template's tensors.
        base: The base.

    Raises:
        SourceError: another kind of template, or other numbers of tokens.
        BaseMismatchError: another kind of base.
    """
    found = yaml_beside(file, OPENPROMPT)
    if found is None and file.absolute().parent.name == "checkpoints":
        found = yaml_beside(file.absolute().parent, OPENPROMPT)
    if found is None or not isinstance(found[0].get("template"), str):
        return  # another tool's
    config, where = found
    said = config["template"]
    if any(said in kinds for kinds in _KINDS.values()) and said not in _KINDS[kind]:
        raise SourceError(f"{where} says template {said!r}, and the checkpoint has {kind}")
    section = config.get(said)
    if isinstance(section, Mapping):
        _check_section(section, kind, parts, where)
    model = config.get("plm")
    name = model.get("model_name") if isinstance(model, Mapping) else None
    if base and isinstance(name, str) and name.removesuffix("-lm") != base.model_type:
        raise BaseMismatchError(f"{where} says plm.model_name {name!r}; base {base.base.name} is {base.model_type!r}")


def _check_section(section: Mapping[str, Any], kind: str, parts: Mapping[str, Any], where: str) -> None:
    if kind == "soft_embeds":
        check_count(section.get("num_tokens"), len(parts[kind]), where, "num_tokens")
    if kind == "new_embedding.weight":
        encoder = "lstm" if any(name.startswith("new_lstm_head.") for name in parts) else "mlp"
        if (said := section.get("prompt_encoder_type")) not in (None, encoder):
            raise SourceError(f"{where} says prompt_encoder_type {said!r}, and the tensors are those of {encoder!r}")
    if not kind.endswith("wte.weight"):
        return
    for side, option in (("", "using_encoder_past_key_values"), ("decoder_", "using_decoder_past_key_values")):
        if f"{side}wte.weight" not in parts:
            continue
        check_count(section.get("num_token"), len(parts[f"{side}wte.weight"]), where, "num_token")
        first = parts.get(f"{side}control_trans.0.weight")
        if first is not None:
            check_count(section.get("mid_dim"), len(first), where, "mid_dim")
        if section.get(option) is False:
            raise SourceError(f"{where} says {option} false, and the checkpoint has {side}wte.weight")
