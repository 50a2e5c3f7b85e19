"""OpenPrompt 1.0 checkpoints: a state_dict with `prompt_model.template.*` and `prompt_model.verbalizer.*`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprompt import names
from edgeprompt.errors import SourceError, UnsupportedError
from edgeprompt.prompts.file import Head, HeadStep
from edgeprompt.prompts.verbalizer import ids_alone, ids_behind, text_before_words
from exporters.importers.base_weights import EMBEDDING, LEFT_OUT, check_copy
from exporters.importers.configs import check_openprompt
from exporters.importers.foreign import (
    Array,
    BaseFacts,
    ForeignPrompt,
    ReadOptions,
    as_prefix,
    as_rows,
    need_base,
    prefix_sizes,
    prompt_name,
)
from exporters.importers.openprompt_template import ReadTemplate, read_template
from exporters.importers.p_tuning_v2 import project
from exporters.importers.reading import PICKLES, Contents, read_checkpoint

_TEMPLATE = re.compile(
    r"^(?:(?:prompt_model\.)?template\.)?(soft_embeds|soft_embedding\.weight|new_embedding\.weight"
    r"|new_(?:lstm|mlp)_head\..+|(?:decoder_)?wte\.weight|(?:decoder_)?control_trans\.[02]\.(?:weight|bias))$"
)
_VERBALIZER = re.compile(r"^(?:prompt_model\.)?verbalizer\.(label_words_ids|words_ids_mask|label_words_mask|head\..+)$")
_SOFT = "SoftTemplate"
_KINDS = ("new_embedding.weight", "soft_embeds", "soft_embedding.weight", "decoder_wte.weight", "wte.weight")
_PREFIX = ("wte.", "decoder_wte.", "control_trans.", "decoder_control_trans.")
_BELONGS = {
    "new_embedding.weight": ("new_embedding.", "new_lstm_head.", "new_mlp_head.", "soft_embedding."),
    "soft_embeds": ("soft_embeds",),
    "soft_embedding.weight": ("soft_embedding.",),
    "decoder_wte.weight": _PREFIX,
    "wte.weight": _PREFIX,
}
"""What else a template of each kind has."""
_BASE = re.compile(
    r"^(?:prompt_model\.)?(?:plm\.(?!.*(?:adapter|lora_|ia3_|prompt|prefix|soft|delta))"
    r"|(?:template\.)?(?:raw_embedding\.weight|new_ids|input_tokens|prefix_tokens)$)"
)
_PLM = re.compile(r"^(?:prompt_model\.)?plm\.(.+)$")
"""The base's own weights, and what a template makes again from its text."""


def recognises(source: Path, contents: Contents) -> bool:
    """A checkpoint with one of OpenPrompt's soft templates."""
    found = {match[1] for name in contents.tensors if (match := _TEMPLATE.search(name))}
    return bool(found & set(_KINDS))


def read(source: Path, base: BaseFacts | None, options: ReadOptions) -> list[ForeignPrompt]:
    """The template's soft tokens or prefix, and the verbalizer."""
    if source.suffix not in (*PICKLES, ".safetensors"):
        raise SourceError(f"{source.name} is no PyTorch or safetensors file")
    checkpoint = read_checkpoint(source, lambda name: bool(_TEMPLATE.search(name) or _VERBALIZER.search(name)))
    tensors = checkpoint.tensors
    parts = {match[1]: tensor for name, tensor in tensors.items() if (match := _TEMPLATE.search(name))}
    words = {match[1]: tensor for name, tensor in tensors.items() if (match := _VERBALIZER.search(name))}
    prompt = ForeignPrompt(
        prompt_name(source),
        "prompt-tuning",
        source={"format": "openprompt"},
        notes=(LEFT_OUT,) if any(_name_in_base(name) for name in checkpoint.names) else (),
    )
    kind = next((kind for kind in _KINDS if kind in parts), None)
    if kind is None:
        raise SourceError(f"{source.name} has no soft tokens of OpenPrompt; looked for {', '.join(_KINDS)}")
    mixed = sorted(name for name in parts if not name.startswith(_BELONGS[kind]))
    if mixed:
        raise SourceError(f"{source.name} holds {kind} and {', '.join(mixed)}, which are of different templates")
    checkpoint.account(lambda name: bool(_BASE.search(name)), "OpenPrompt")
    check_openprompt(source, kind, parts, base)
    prompt = replace(prompt, notes=(*prompt.notes, *check_copy(checkpoint, base, _name_in_base, "OpenPrompt")))
    template = read_template(options.template, base)
    if "new_embedding.weight" in parts:
        prompt = _ptuning(prompt, parts, template, base)
    elif "soft_embeds" in parts:
        prompt = replace(
            prompt,
            prompt_embeddings=as_rows(parts["soft_embeds"], "soft_embeds", base),
            template=template.in_front() if template else None,
            found=(f"{_SOFT} with {len(parts['soft_embeds'])} soft tokens",),
        )
    elif "soft_embedding.weight" in parts:
        prompt = _mixed(prompt, parts["soft_embedding.weight"], template, base)
    else:
        prompt = _prefix(prompt, parts, template, base)
    return [_with_verbalizer(prompt, words, base, options)]


def _name_in_base(name: str) -> str | None:
    if name.endswith("template.raw_embedding.weight"):
        return EMBEDDING
    match = _PLM.search(name)
    return match[1] if match else None


def _ptuning(
    prompt: ForeignPrompt, parts: Mapping[str, Array], template: ReadTemplate | None, base: BaseFacts | None
) -> ForeignPrompt:
    rows = as_rows(_encode(parts), "the projected new_embedding", base)
    prompt = replace(
        prompt,
        method="p-tuning",
        prompt_embeddings=rows,
        found=(f"PtuningTemplate with {len(rows)} soft tokens, its encoder run",),
    )
    if template is None:
        return _unplaced(prompt)
    if template.soft_ids and template.places != len(rows):
        raise SourceError(f"the template places {template.places} soft tokens, the checkpoint has {len(rows)}")
    return replace(prompt, template=template.scattered(), add_special_tokens=template.adds_specials)


def _encode(parts: Mapping[str, Array]) -> Array:
    """Run the LSTM, where there is one, and the MLP (P-tuning, Liu et al. 2021, arXiv:2103.10385)."""
    import torch

    rows = torch.from_numpy(np.array(parts["new_embedding.weight"], np.float32))[None]
    width = rows.shape[-1]
    weights = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in parts.items() if "_head." in name}
    mlp_in = 2 * width if any(name.startswith("new_lstm_head.") for name in weights) else width
    mlp = torch.nn.Sequential(torch.nn.Linear(mlp_in, width), torch.nn.ReLU(), torch.nn.Linear(width, width))
    modules: list[tuple[str, torch.nn.Module]] = [("new_mlp_head.", mlp)]
    if mlp_in != width:
        lstm = torch.nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        modules.insert(0, ("new_lstm_head.", lstm))
    with torch.no_grad():
        for prefix, module in modules:
            try:
                module.load_state_dict(
                    {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
                )
            except RuntimeError as error:
                raise SourceError(
                    f"{prefix}* does not fit new_embedding: {' '.join(str(error).split())[:200]}"
                ) from error
            rows = module(rows)
            rows = rows[0] if isinstance(rows, tuple) else rows
    return np.asarray(rows[0].numpy())


def _mixed(prompt: ForeignPrompt, table: Array, template: ReadTemplate | None, base: BaseFacts | None) -> ForeignPrompt:
    """Rows in the order of their places; soft ids start at 1, row 0 is never used."""
    as_rows(table, "soft_embedding.weight", base)
    if len(table) < 2:
        raise SourceError("soft_embedding.weight has no row behind the unused first one")
    prompt = replace(prompt, prompt_embeddings=table[1:], found=(f"MixedTemplate with {len(table) - 1} soft tokens",))
    prompt = replace(prompt, dropped=(*prompt.dropped, "soft_embedding.weight[0]: OpenPrompt's row for no soft token"))
    if template is None:
        return _unplaced(prompt)
    ids = list(template.soft_ids) or list(range(1, len(table)))
    if len(set(ids)) + template.skipped != len(table) - 1:
        raise SourceError(f"the template has {len(set(ids))} soft tokens, the checkpoint {len(table) - 1}")
    if template.skipped:
        lost = f"{template.skipped} soft tokens without text: OpenPrompt never feeds them to a causal model"
        prompt = replace(prompt, dropped=(*prompt.dropped, lost))
    return replace(
        prompt,
        prompt_embeddings=table[ids],
        template=template.scattered(),
        add_special_tokens=template.adds_specials,
    )


def _prefix(
    prompt: ForeignPrompt, parts: Mapping[str, Array], template: ReadTemplate | None, base: BaseFacts | None
) -> ForeignPrompt:
    facts = need_base(base, "an OpenPrompt prefix", "its rows say nothing of layers and heads")
    found: dict[str, Array] = {}
    for side, key, encoder in (("", "encoder_past_key_values", True), ("decoder_", "past_key_values", False)):
        if f"{side}wte.weight" not in parts:
            continue
        needed = [f"{side}control_trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
        missing = [name for name in needed if name not in parts]
        if missing:
            raise SourceError(f"the prefix lacks {missing[0]}")
        rows = project(parts[f"{side}wte.weight"], *(parts[name] for name in needed), name=f"{side}control_trans")
        layers, heads = prefix_sizes(facts, encoder)
        if layers == 0:
            raise SourceError(f"the checkpoint has a prefix in an encoder, and {facts.base.name} has none")
        found[key] = as_prefix(rows, f"{side}control_trans", layers, heads, facts, encoder)
    return replace(
        prompt,
        method="prefix-tuning",
        past_key_values=found.get("past_key_values"),
        encoder_past_key_values=found.get("encoder_past_key_values"),
        template=template.in_front() if template else None,
        found=tuple(
            f"PrefixTuningTemplate with {prefix.shape[3]} tokens, projected by its MLP: {key}"
            for key, prefix in found.items()
        ),
    )


def _unplaced(prompt: ForeignPrompt) -> ForeignPrompt:
    lost = "the places of the soft tokens, which no checkpoint holds: give --template (default: all in front)"
    return replace(prompt, dropped=(*prompt.dropped, lost))


def _with_verbalizer(
    prompt: ForeignPrompt, words: Mapping[str, Array], base: BaseFacts | None, options: ReadOptions
) -> ForeignPrompt:
    if "head.weight" in words:
        return _soft_verbalizer(prompt, words["head.weight"], base)
    if any(name.startswith("head.") for name in words):
        raise UnsupportedError(
            "the SoftVerbalizer's head includes the masked-language-model's own layers, read at the mask; "
            "convert with a ManualVerbalizer, or train a classifier head in PEFT"
        )
    if "label_words_ids" not in words:
        return prompt
    prompt = replace(prompt, verbalizer_aggregation="mean")  # ManualVerbalizer.aggregate
    ids = words["label_words_ids"]
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise SourceError(
            f"label_words_ids is {ids.dtype} {list(ids.shape)}; integers [classes, words, tokens] are needed"
        )
    used, there = (words.get(name) for name in ("words_ids_mask", "label_words_mask"))
    if used is None or there is None:
        raise SourceError("the checkpoint has label_words_ids, and lacks words_ids_mask or label_words_mask")
    if used.shape != ids.shape or there.shape != ids.shape[:2] or not np.array_equal(used[..., 0] != 0, there != 0):
        raise SourceError(
            f"words_ids_mask {list(used.shape)} and label_words_mask {list(there.shape)} do not fit label_words_ids "
            f"{list(ids.shape)}"
        )
    if not (np.isin(used, (0, 1)).all() and np.isin(there, (0, 1)).all()):
        raise SourceError("words_ids_mask and label_words_mask must hold 0 and 1 alone")
    if not there.any(axis=1).all():
        raise SourceError("the verbalizer has a class without label words")
    # T5 answers behind its first sentinel: <pad> <extra_id_0> word.
    lead = {"decoder_prefix": "<extra_id_0>"} if base and base.architecture == names.ENCODER_DECODER else {}
    prompt = replace(prompt, generation=lead)
    if options.words:
        return prompt
    if base is None or base.tokenizer is None:
        lost = "the verbalizer: its word ids need the base's tokenizer; give --base with one, or --verbalizer"
        return replace(prompt, dropped=(*prompt.dropped, lost))
    labels = options.labels or tuple(f"LABEL_{index}" for index in range(len(ids)))
    if len(labels) != len(ids):
        raise SourceError(f"{len(labels)} labels given, the verbalizer has {len(ids)} classes")
    before = None if lead else text_before_words(prompt.template) if prompt.template else ""
    found = {
        label: tuple(_word(number, base, before) for number in _words_of(label, rows[mask != 0, 0]))
        for label, rows, mask in zip(labels, ids, there, strict=True)
    }
    said = "; ".join(f"{label}: {', '.join(map(repr, texts))}" for label, texts in found.items())
    if used[..., 1:].any():
        raise UnsupportedError(
            "the verbalizer has label words of several tokens, and no checkpoint says whether OpenPrompt read their "
            "first token (its default), their mean or their maximum; if it was the first, give the words' first "
            f"tokens with --verbalizer ({said}); the others cannot be converted"
        )
    return replace(
        prompt,
        verbalizer=found,
        task="classify",
        found=(*prompt.found, f"ManualVerbalizer, {said}"),
    )


def _words_of(label: str, numbers: Array) -> list[int]:
    """Ids of a label's words, each once: the mean is the same where all are there equally often."""
    counts = Counter(map(int, numbers))
    if len(set(counts.values())) > 1:
        twice = counts.most_common(1)[0][0]
        raise UnsupportedError(
            f"label {label!r} has the word id {twice} more often than others, so OpenPrompt's mean weighs it more; "
            "choose words with --verbalizer"
        )
    return list(counts)


def _word(number: int, base: BaseFacts, before: str | None) -> str:
    """The text that is token `number` alone where label words stand: behind `before`, or (None) at the start."""
    tokenizer: Any = base.tokenizer
    if not 0 <= number < base.geometry.vocab_size:
        raise SourceError(f"label word id {number} is outside the base's vocabulary of {base.geometry.vocab_size}")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    text = str(tokenizer.decode([number]))
    for word in (text, f" {text}"):  # decoders of SentencePiece drop a leading space
        if (ids_alone(encode, word) if before is None else ids_behind(encode, before, word)) == [number]:
            return word
    raise UnsupportedError(
        f"label word {number} ({text!r}) is a token that text alone does not give; choose words with --verbalizer"
    )


def _soft_verbalizer(prompt: ForeignPrompt, weight: Array, base: BaseFacts | None) -> ForeignPrompt:
    facts = need_base(base, "a SoftVerbalizer", "its architecture says which hidden state the head reads")
    if facts.architecture != names.DECODER_ONLY:
        raise UnsupportedError(
            f"a SoftVerbalizer on a {facts.architecture} base reads the hidden state at the mask or in the decoder, "
            "where prompt files have no head; convert with a ManualVerbalizer"
        )
    if weight.ndim != 2 or weight.shape[1] != facts.geometry.hidden_size:
        raise SourceError(
            f"head.weight is {list(weight.shape)}, the base's hidden size is {facts.geometry.hidden_size}"
        )
    if prompt.found[0].startswith(_SOFT):
        raise UnsupportedError(
            "OpenPrompt's SoftVerbalizer behind a SoftTemplate reads the hidden state as many positions before the "
            "mask as there are soft tokens (the template shifts the logits alone), so its head never learnt from the "
            "mask; train with a ManualVerbalizer or a MixedTemplate, or a classifier in PEFT"
        )
    spec = Head("last", (HeadStep("linear", "score"),))
    found = (*prompt.found, f"SoftVerbalizer with {len(weight)} classes")
    return replace(prompt, task="classify", head={"score.weight": weight}, head_spec=spec, found=found)
