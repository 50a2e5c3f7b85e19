"""PEFT adapters: `adapter_config.json` with `adapter_model.safetensors` or `.bin` (PEFT 0.2 to 0.21)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, SourceError, UnsupportedError
from edgeprompt.prompts.template import Literal, Slot, Template, VirtualTokens
from exporters.importers.foreign import (
    Array,
    BaseFacts,
    ForeignPrompt,
    ReadOptions,
    as_prefix,
    as_rows,
    need_base,
    prompt_name,
)
from exporters.importers.foreign_heads import describe_head
from exporters.importers.reading import Contents, is_there, read_checkpoint, read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_METHODS = {
    "PROMPT_TUNING": "prompt-tuning",
    "CPT": "prompt-tuning",
    "TRAINABLE_TOKENS": "prompt-tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix-tuning",
    "CARTRIDGE": "prefix-tuning",
    "MULTITASK_PROMPT_TUNING": "multitask-prompt-tuning",
}
_CHANGES_WEIGHTS = (
    *("LORA", "ADALORA", "ADAMSS", "BOFT", "ADAPTION_PROMPT", "IA3", "BEFT", "LILY", "LOHA", "LOKR", "OFT", "POLY"),
    *("LN_TUNING", "VERA", "FROD", "PVERA", "FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA", "UNILORA", "MISS", "BONE"),
    *("RANDLORA", "ROAD", "HIRA", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA", "TINYLORA", "PSOFT", "PEANUT"),
    *("SHADOW", "SUPERTUNING", "DEFT"),
)
_TASKS = {
    "CAUSAL_LM": "generate",
    "SEQ_2_SEQ_LM": "generate",
    "SEQ_CLS": "classify",
    "TOKEN_CLS": "tag",
    "QUESTION_ANS": "qa",
    "FEATURE_EXTRACTION": "embed",
}
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_SIZES = ("token_dim", "num_layers", "num_attention_heads")
_OUTPUT = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer)\.weight$")
_EMBEDDING = re.compile(
    _OUTPUT.pattern + r"|(?:^|\.)(?:embed_tokens|wte|word_embeddings?|shared|embed_in|tok_embeddings)\.weight$"
)
_COPIES = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_ROWS, _COLUMNS, _FACTORS = names.PROMPT_EMBEDDINGS, "prefix_task_cols", "prefix_task_rows"
_DELTA = "trainable_tokens_delta"
_SCALES_IDS_ONLY = ("pegasus", "marian")
_SCALED_EMBEDDINGS = ("gemma", "bart", "mbart", "pegasus")


def recognises(source: Path, contents: Contents) -> bool:
    """A folder with an adapter_config.json, or the weights beside one."""
    return _folder(source) is not None


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """The adapter's prompt; for MULTITASK_PROMPT_TUNING one per task, composed."""
    folder = _folder(source)
    if folder is None:
        raise SourceError(f"{str(source)!r} has no {CONFIG}, so it is no PEFT adapter")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise SourceError(f"{CONFIG} in {str(folder)!r} names no peft_type")
    if kind not in _METHODS and kind not in _CHANGES_WEIGHTS:
        raise UnsupportedError(f"peft_type {kind!r} is no method of PEFT that is known here: {', '.join(_METHODS)}")
    if kind not in _METHODS:
        raise UnsupportedError(
            f"{kind!r} changes the base's weights, and a soft prompt cannot carry that: merge it into the base with "
            f"PeftModel.merge_and_unload(), export the merged model, or train a prompt (known: {', '.join(_METHODS)})"
        )
    if kind == "TRAINABLE_TOKENS":
        return [_trainable_tokens(folder, config, base, options)]
    task_type = config.get("task_type") or "CAUSAL_LM"
    if not isinstance(task_type, str) or task_type not in _TASKS:
        raise SourceError(f"task_type is {task_type!r}, known: {', '.join(_TASKS)}")
    tensors = _tensors(folder, base)
    if _ROWS not in tensors:
        raise SourceError(f"the adapter in {str(folder)!r} has no {_ROWS}; it has {', '.join(tensors) or 'nothing'}")
    prompt = ForeignPrompt(
        prompt_name(folder),
        _METHODS[kind],
        _TASKS[task_type],
        base_name=_base_name(config),
        source={"format": "peft", "peft_type": kind, "task_type": task_type},
        found=(f"PEFT {kind} for {task_type}", *(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())),
    )
    deep = kind in ("PREFIX_TUNING", "CARTRIDGE")
    prompt = _with_head(prompt, tensors, task_type, base, deep=deep)
    if task_type == "QUESTION_ANS" and options.template is None:
        prompt = replace(prompt, template=_without_segments(base, deep=deep))
    rows = tensors[_ROWS]
    _check_sizes(config, rows, base, deep=deep)
    if deep:
        return [_with_prefix(prompt, rows, config, base)]
    if kind != "MULTITASK_PROMPT_TUNING":
        return [_with_rows(prompt, rows, config, base)]
    composed = _compose(rows, tensors, config)
    return [
        _with_rows(replace(prompt, name=f"{prompt.name}-{task}"), table, config, base)
        for task, table in enumerate(composed)
    ]


def _folder(source: Path) -> Path | None:
    folder = source if source.is_dir() else source.parent
    belongs = source.is_dir() or source.name in WEIGHTS
    return folder if belongs and is_there(folder / CONFIG) else None


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if is_there(folder / name):
            return folder / name
    raise SourceError(f"the adapter in {str(folder)!r} has neither {' nor '.join(WEIGHTS)}")


def _tensors(folder: Path, base: BaseFacts | None) -> dict[str, Array]:
    """The adapter's tensors by their names in PEFT; copies of what was frozen are left out.

    Embeddings that PEFT saved because the vocabulary had been resized are left out where they are the base's own.
    """
    found = read_checkpoint(_weights(folder)).tensors
    plain: dict[str, Array] = {}
    for name, tensor in found.items():
        if ".original_module." in name:
            continue
        name = _COPIES.sub("", name)
        if _EMBEDDING.search(name):
            _check_embedding(name, tensor, base)
            continue
        if name in plain:
            raise SourceError(f"the adapter in {str(folder)!r} has {name} twice")
        plain[name] = tensor
    return plain


def _check_embedding(name: str, tensor: Array, base: BaseFacts | None) -> None:
    """Refuse embeddings that are not the base's own.

    Raises:
        NeedsBaseError: there is no base to compare with.
        UnsupportedError: the base is a package, or has others.
    """
    saved = f"the adapter also holds {name} {list(tensor.shape)}, as PEFT saves embeddings of a resized vocabulary"
    facts = need_base(base, f"an adapter with {name}", "only where it is the base's own, the prompt fits that base")
    if facts.embeddings is None:
        raise UnsupportedError(
            f"{saved}: give the resized model itself as --base, not its package, so that they can be compared"
        )
    rows, output = facts.embeddings()
    own = output if _OUTPUT.search(name) and output is not None else rows
    if own.shape == tensor.shape and np.array_equal(own.astype(tensor.dtype), tensor):
        return
    differ = "other values" if own.shape == tensor.shape else f"{list(own.shape)}"
    raise UnsupportedError(
        f"{saved}; base {facts.base.name} has {differ}: save the model that the prompt was trained on "
        "(model.get_base_model().save_pretrained(FOLDER), and its tokenizer), and give that folder as --base"
    )


def _check_sizes(config: Mapping[str, Any], rows: Array, base: BaseFacts | None, *, deep: bool) -> None:
    """Refuse a config whose sizes are not those of the tensor, or of the base (PEFT fills them in from its config).

    Raises:
        SourceError: it contradicts the tensor.
        BaseMismatchError: it contradicts the base.
    """
    if rows.ndim != 2:
        return  # refused with its shape, where it is read
    said = {name: _count(config, name) for name in _SIZES if config.get(name) is not None}
    width = said.get("token_dim")
    if deep:
        layers = _count(config, "num_layers")
        if width is not None and rows.shape[1] != 2 * layers * width:
            raise SourceError(
                f"{_ROWS} is {list(rows.shape)}; {CONFIG} says 2 x {layers} layers x token_dim {width}, which are "
                f"{2 * layers * width} values a token"
            )
        return
    if width is not None and rows.shape[1] != width:
        raise SourceError(f"{_ROWS} is {list(rows.shape)}; {CONFIG} says token_dim {width}")
    if base is None:
        return
    sizes = base.geometry
    allowed_sizes: dict[str, tuple[int, ...]] = {}
    if base.architecture == names.ENCODER_DECODER:  # PEFT counts the layers of one of both
        allowed_sizes["num_layers"] = (sizes.num_layers, sizes.num_encoder_layers)
    else:
        allowed_sizes["num_layers"] = (sizes.num_layers,)
        allowed_sizes["num_attention_heads"] = (sizes.num_attention_heads, sizes.num_key_value_heads)
    for name, allowed in allowed_sizes.items():
        if name in said and said[name] not in allowed:
            raise BaseMismatchError(f"{CONFIG} says {name} {said[name]}; base {base.base.name} has {allowed[0]}")


def _with_rows(prompt: ForeignPrompt, rows: Array, config: Mapping[str, Any], base: BaseFacts | None) -> ForeignPrompt:
    """Keep the rows that PEFT puts in front of the (encoder's) text."""
    as_rows(rows, _ROWS, base)
    if base and base.model_type in _SCALES_IDS_ONLY:
        raise UnsupportedError(
            f"PEFT hands {base.model_type} embeddings without the scale that it gives to ids, so a prompt trained "
            "with it fits no base that reads ids; use prefix tuning there"
        )
    count, submodules = _count(config, "num_virtual_tokens"), _submodules(config)
    if len(rows) == count:
        return replace(prompt, prompt_embeddings=rows)
    if len(rows) != count * submodules:
        raise SourceError(f"{_ROWS} has {len(rows)} rows, the config says {count} virtual tokens x {submodules}")
    unused = f"{_ROWS}[{count}:{len(rows)}]: PEFT allocates them for the decoder and never uses them in generate"
    return replace(prompt, prompt_embeddings=rows[:count], dropped=(*prompt.dropped, unused))


def _with_prefix(
    prompt: ForeignPrompt, rows: Array, config: Mapping[str, Any], base: BaseFacts | None
) -> ForeignPrompt:
    """Keys and values per layer, in the layers where PEFT puts them.

    Under grouped-query attention the config's num_attention_heads and token_dim are those of keys and values. With two
    submodules (encoder-decoder) PEFT repeats the stack and hands it out in fours, so that decoder layer i gets slot
    2i modulo the number of layers (peft_model.py, get_prompt).
    """
    layers, heads = _count(config, "num_layers"), _count(config, "num_attention_heads")
    if len(rows) != _count(config, "num_virtual_tokens"):
        raise SourceError(
            f"{_ROWS} has {len(rows)} rows, the config says {config['num_virtual_tokens']} virtual tokens"
        )
    prefix = as_prefix(rows, _ROWS, layers, heads, base)
    if _submodules(config) != 2:
        return replace(prompt, past_key_values=prefix)
    slots = [2 * layer % layers for layer in range(layers)]
    unused = sorted(set(range(layers)) - set(slots))
    dropped = (
        [f"layers {', '.join(map(str, unused))} of the prefix: PEFT reads layer 2i modulo {layers} for decoder layer i"]
        if unused
        else []
    )
    return replace(prompt, past_key_values=np.ascontiguousarray(prefix[slots]), dropped=(*prompt.dropped, *dropped))


def _compose(rows: Array, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> list[Array]:
    """prompt[t] = rows * (columns[t] @ factors[t]) (Wang et al. 2023, arXiv:2303.02861)."""
    columns, factors = tensors.get(_COLUMNS), tensors.get(_FACTORS)
    if columns is None or factors is None:
        raise SourceError(f"a MULTITASK_PROMPT_TUNING adapter needs {_COLUMNS} and {_FACTORS}; one is missing")
    fits = columns.ndim == factors.ndim == 3 and columns.shape[0] == factors.shape[0]
    if not fits or columns.shape[1:] != (len(rows), factors.shape[1]) or factors.shape[2] != rows.shape[-1]:
        raise SourceError(
            f"{_COLUMNS} {list(columns.shape)} and {_FACTORS} {list(factors.shape)} do not fit "
            f"{_ROWS} {list(rows.shape)}"
        )
    for name, size in (("num_tasks", columns.shape[0]), ("num_ranks", columns.shape[2])):
        if config.get(name) is not None and _count(config, name) != size:
            raise SourceError(f"{_COLUMNS} is {list(columns.shape)}; {CONFIG} says {name} {config[name]}")
    return [rows * (columns[task] @ factors[task]) for task in range(len(columns))]


def _with_head(
    prompt: ForeignPrompt, tensors: Mapping[str, Array], task_type: str, base: BaseFacts | None, *, deep: bool
) -> ForeignPrompt:
    """The task's head. Behind embedding prompts, PEFT trains question answering on positions that do not count them."""
    head = {
        name.removeprefix("base_model.").removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name != _ROWS and not (prompt.method == "multitask-prompt-tuning" and name in (_COLUMNS, _FACTORS))
    }
    if task_type not in _HEAD_TASKS:
        if head:
            _refuse_extra(head)
        return prompt
    facts = need_base(base, f"a {task_type} adapter", "the base's family says what its head does")
    spec, used = describe_head(head, task_type, facts)
    if task_type == "QUESTION_ANS" and not deep:
        spec = replace(spec, input="tokens_unshifted")
    kept = {name: tensor for name, tensor in head.items() if name.rpartition(".")[0] in used}
    if len(kept) != len(head):
        _refuse_extra({name: tensor for name, tensor in head.items() if name not in kept})
    return replace(prompt, head=kept, head_spec=spec)


def _refuse_extra(tensors: Mapping[str, Array]) -> NoReturn:
    raise UnsupportedError(
        f"the adapter also changes the base's {', '.join(sorted(tensors))}, which a soft prompt cannot carry: merge it "
        "into the base and export that, or train without modules_to_save"
    )


def _without_segments(base: BaseFacts | None, *, deep: bool) -> Template | None:
    """A question and its context in one segment: PEFT's forward for question answering drops `token_type_ids`.

    None where the tokenizer gives a pair no segments; the default template is right then.
    """
    if base is None or base.tokenizer is None:
        return None
    one = list(base.tokenizer.encode("a", add_special_tokens=False))
    if hasattr(base.tokenizer, "encode_pair"):
        ids, _, segments, _ = base.tokenizer.encode_pair("a", "a")
    else:
        pair = base.tokenizer("a", "a", return_token_type_ids=True)
        ids, segments = pair["input_ids"], pair["token_type_ids"]
    places = [at for at in range(len(ids)) if list(ids[at : at + len(one)]) == one]
    if not any(segments) or len(places) != 2:
        return None
    between = base.tokenizer.decode(list(ids[places[0] + len(one) : places[1]]), skip_special_tokens=False)
    front = () if deep else (VirtualTokens(),)
    return Template((*front, Slot("question"), Literal(between), Slot("context")))


def _trainable_tokens(
    folder: Path, config: Mapping[str, Any], base: BaseFacts | None, options: ReadOptions
) -> ForeignPrompt:
    """Replaced rows of the input embedding become virtual tokens (the "delta" holds whole rows, not differences)."""
    tensors = _tensors(folder, base)
    ids = config.get("token_indices")
    if not isinstance(ids, list) or not ids or not all(isinstance(number, int) for number in ids):
        raise SourceError(f"{CONFIG} of a TRAINABLE_TOKENS adapter must list token_indices, found {ids!r}")
    targets = config.get("target_modules") or "embed_tokens"
    wanted = tuple(map(str, targets if isinstance(targets, list) else [targets]))
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(f".{_DELTA}")}
    modules = {name: name.removesuffix(f".{_DELTA}") for name in found}  # wrappers' names are off already
    inputs = [
        name
        for name, module in modules.items()
        if any(f".{module}".endswith(f".{one.split('.')[-1]}") for one in wanted)
    ]
    if len(inputs) != 1:
        raise SourceError(
            f"expected one {_DELTA} for {', '.join(map(repr, wanted))}, found {', '.join(found) or 'none'}"
        )
    rows = as_rows(found[inputs[0]], inputs[0], base)
    if len(rows) != len(ids):
        raise SourceError(f"{inputs[0]} has {len(rows)} rows for {len(ids)} token_indices")
    if base and base.model_type.startswith(_SCALED_EMBEDDINGS):
        raise UnsupportedError(
            f"{base.model_type} scales its embeddings behind the look-up, so replaced rows are no virtual tokens "
            "there; use prompt tuning"
        )
    others = set(tensors) - {inputs[0]}
    odd = sorted(
        name
        for name in others
        if name not in found or not np.array_equal(found[name], found[inputs[0]], equal_nan=True)
    )
    if odd:  # PEFT writes the same rows again for a tied output layer, and nothing else
        _refuse_extra({name: tensors[name] for name in odd})
    unplaced = "the places of these tokens: give --template with {prompt:1} where each stands (default: all in front)"
    return ForeignPrompt(
        prompt_name(folder),
        "prompt-tuning",
        prompt_embeddings=rows,
        base_name=_base_name(config),
        source={"format": "peft", "peft_type": "TRAINABLE_TOKENS", "task_type": "CAUSAL_LM", "token_indices": ids},
        found=(f"PEFT TRAINABLE_TOKENS, ids {', '.join(map(str, ids))} as virtual tokens in this order",),
        dropped=(
            *(
                f"{name}: a prompt changes no output layer, so these tokens cannot be generated"
                for name in sorted(others)
            ),
            *([] if options.template else [unplaced]),
        ),
    )


def _base_name(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _submodules(config: Mapping[str, Any]) -> int:
    """How many stacks PEFT counts: 2 for an encoder-decoder, unless the config says 1."""
    name = "num_transformer_submodules"
    return 1 if config.get(name) is None else _count(config, name)


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 20:
        raise SourceError(f"{CONFIG}: {name} is {value!r}, a positive number is needed")
    return value
