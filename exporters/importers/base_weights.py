"""Whether the copy of a base inside a foreign checkpoint is the base itself, or was trained with the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from edgeprompt.base.fingerprint import BUFFER, Digest, fingerprint_of, joined_fingerprint, sampled_rows
from edgeprompt.errors import BaseMismatchError
from edgeprompt.package.fingerprint import differences, parse, weaker
from exporters.importers.foreign import BaseFacts
from exporters.importers.reading import Checkpoint

_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|wte|shared|raw_embedding|tok_embeddings)\.weight$")
_BUFFER = re.compile(r"(?:position_ids|inv_freq|(?:^|\.)(?:attn|attention)\.(?:masked_)?bias)$")
_LEGACY = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))
_HEAD = re.compile(r"(?:^|\.)(?:cls|lm_head|vocab_\w+|predictions|generator_\w+)\.")
_POOLER = re.compile(r"(?:^|\.)pooler\.dense\.")
_DIGEST = re.compile(r"[0-9a-f]{16,64}$")

EMBEDDING = "raw_embedding.weight"
"""What `NameInBase` answers for a copy of the input embedding, whatever the base calls it."""

LEFT_OUT = "the checkpoint's copy of the base's weights is left out; --base has them"
"""What a report says of a copy: nothing of the prompt is lost."""

NameInBase = Callable[[str], "str | None"]
"""A tensor's name as the base model has it; None for what is no copy of the base."""


def check_copy(
    checkpoint: Checkpoint, base: BaseFacts | None, name_in_base: NameInBase, tool: str, padded: bool = False
) -> tuple[str, ...]:
    """Compare a checkpoint's copy of the base with the base.

    A base folder is compared tensor by tensor. A package has no weights by name; its fingerprint, which covers every
    matrix and bias, is compared with that of the copy. Packages of older versions have one of the embedding alone.

    Args:
        checkpoint: The foreign file.
        base: What `--base` is; nothing is compared without one.
        name_in_base: Which tensors are copies of the base's.
        tool: Its name, for messages.
        padded: Whether the tool pads the vocabulary: rows behind the base's are no one's.

    Returns:
        Notes on what could not be compared.

    Raises:
        BaseMismatchError: the copy differs, so the base was trained together with the prompt, or is another one.
    """
    copied = {
        name: inside for name in checkpoint.names if (inside := name_in_base(name)) and not _BUFFER.search(inside)
    }
    if base is None or not copied:
        return ()
    if base.weights is None:
        return _by_fingerprint(checkpoint, base, copied, tool)
    weights = base.weights()
    plain = {_without(base, name): name for name in weights}
    embedding = next((name for name in weights if _EMBEDDING.search(name)), None)
    unknown: list[str] = []
    differ: list[list[str]] = [[], [], []]
    equal = 0
    for name, tensor in checkpoint.each(copied):
        if not tensor.is_floating_point():
            continue
        mine = embedding if copied[name] == EMBEDDING else plain.get(_without(base, copied[name]))
        if mine is None:
            unknown.append(name)
            continue
        same = _same(tensor, weights[mine], padded)
        equal += any(same)
        for names, one in zip(differ, same, strict=True):
            names += [] if one else [name]
    other = min(differ, key=len)  # one rounding for the whole copy
    if other or not equal:
        raise _trained(base, tool, [*other, *unknown])
    if unknown:
        return (f"{len(unknown)} tensors of the checkpoint's copy are no part of the base ({', '.join(unknown[:3])})",)
    return ()


def _trained(base: BaseFacts, tool: str, differ: list[str]) -> BaseMismatchError:
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return BaseMismatchError(
        f"the {tool} checkpoint's copy of the base is not {base.base.name}: {', '.join(differ[:3])}{more} differ; "
        "either the base was trained together with the prompt (freeze_plm=False, OpenPrompt's default): export the "
        "trained base and give that, or train with a frozen one; or --base names another model"
    )


def _same(theirs: Any, ours: Any, padded: bool) -> tuple[bool, bool, bool]:
    """Whether both are equal: as they are (ours rounded to their format), or theirs rounded to float16, or bfloat16."""
    import torch

    if theirs.shape != ours.shape:
        table = theirs.dim() == ours.dim() == 2 and theirs.shape[1] == ours.shape[1]
        if not table or (len(theirs) > len(ours) and not padded):
            return False, False, False
        rows = min(len(theirs), len(ours))  # the base's table may have rows of padding
        theirs, ours = theirs[:rows], ours[:rows]
    exact = torch.equal(theirs, ours.to(theirs.dtype))
    half, brain = (torch.equal(theirs.to(kind).float(), ours.float()) for kind in (torch.float16, torch.bfloat16))
    return exact, half, brain


def _without(base: BaseFacts, name: str) -> str:
    """A name without the attribute that models with a head keep the model under (`bert.`, `transformer.`, `model.`)."""
    for pattern, modern in _LEGACY:
        name = pattern.sub(modern, name)
    return name.removeprefix(f"{base.prefix}.") if base.prefix else name


def _by_fingerprint(checkpoint: Checkpoint, base: BaseFacts, copied: Mapping[str, str], tool: str) -> tuple[str, ...]:
    """Compare with a package: its fingerprint of every matrix; that of its embedding where the copy is no more."""
    known = parse(base.base.fingerprint)
    every, first = known.signs, known.first
    name = next((name for name in copied if _EMBEDDING.search(copied[name])), None)
    if not _DIGEST.match(first) or name is None:
        return ()
    ((_, table),) = checkpoint.each((name,))
    rows = base.geometry.vocab_size
    width = base.geometry.embedding_size or base.geometry.hidden_size
    if table.dim() != 2 or len(table) < rows or table.shape[1] != width:
        raise _trained(base, tool, [f"{name} {list(table.shape)}"])
    sample = table[sampled_rows(rows)].float().numpy()
    found = fingerprint_of(base.model_type, base.geometry, sample)
    if not parse(found).first.startswith(first):
        raise _trained(base, tool, [name])
    if len(copied) == 1 or not every:
        return (
            "the checkpoint's copy of the base was compared by its embedding, all that "
            f"{'the checkpoint has' if every else 'the package, which is of an older format, tells'}; --base with the "
            "base's folder compares every tensor",
        )
    candidates = _fingerprints(checkpoint, found, copied, rows, width, known.facts or {})
    same = [one for one in candidates if not differences(base.base.fingerprint, one)]
    if not same:
        raise BaseMismatchError(
            f"the {tool} checkpoint's copy of the base has not the weights of {base.base.name}, only its embedding: "
            "the base was trained together with the prompt (freeze_plm=False, OpenPrompt's default), or the copy lacks "
            "some; give --base with the base's folder, which names the tensors that differ"
        )
    missed = [weaker(base.base.fingerprint, one) for one in same]
    if None in missed:
        return ()
    return (f"the fingerprint of the package {missed[0]}; --base with the base's folder compares every tensor",)


def _fingerprints(
    checkpoint: Checkpoint,
    first: str,
    copied: Mapping[str, str],
    vocab_size: int,
    width: int,
    facts: Mapping[str, Any],
) -> list[str]:
    """What the base's fingerprint would be with the copy's tensors: with and without heads, and without a pooler.

    A copy may have heads that the package has not (a masked-language-model head, next-sentence prediction).
    """
    read: dict[str, Digest] = {}
    names = {**copied, **{name: name for name in checkpoint.names if _POOLER.search(name)}}
    front = _front(names.values())
    for name, tensor in checkpoint.each(names):
        inside = names[name].removeprefix(front)
        for pattern, modern in _LEGACY:
            inside = pattern.sub(modern, inside)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.dim() == 2 and tensor.shape[1] == width and (_EMBEDDING.search(inside) or _HEAD.search(inside)):
            tensor = tensor[:vocab_size]
        read[inside] = Digest(tensor, inside)
    tables = [one for name, one in read.items() if _EMBEDDING.search(name)]
    plain = {
        (BUFFER + name if name == "final_logits_bias" else name.replace("lm_head.", "head.")): one
        for name, one in read.items()
        if not (_HEAD.search(name) and any(one.signs == table.signs for table in tables))  # tied
    }
    kinds: tuple[Callable[[str], bool], ...] = (
        lambda name: True,
        lambda name: not _HEAD.search(name),
        lambda name: not (_HEAD.search(name) or _POOLER.search(name)),
        lambda name: not _POOLER.search(name),
    )
    return [
        joined_fingerprint(first, [(name, one) for name, one in plain.items() if keep(name)], facts) for keep in kinds
    ]


def _front(names: Collection[str]) -> str:
    """What stands in front of the name of every layer's parameters: the attribute that holds the model."""
    layers = {name.split(".")[0] for name in names if re.search(r"\.\d+\.", name)}
    first = layers.pop() if len(layers) == 1 else ""
    return f"{first}." if first and first not in ("encoder", "decoder", "layers", "layer", "h", "block") else ""
