"""Accounts for every parameter of a base: all that the model needs was in the file, all that the file has was used.

Loaders fill what they do not find with random numbers, and pass over what they do not know. Here both are errors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from edgeprompt.base.checkpoint import is_float, shape_of
from edgeprompt.base.source import one_line
from edgeprompt.errors import SourceError

_LOG = logging.getLogger("edgeprompt")

_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""What data-parallel training, torch.compile, FSDP and activation checkpointing put in front of, or between, names."""
_LEADS = ("base_model.model.", "base_model.", "model.", "net.")
"""What PEFT and trainers put in front of all names."""
_UNMERGED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b")
_SMALL = 1 << 16
"""Values of a tensor that are compared whole."""
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block|blocks|blk)\.(\d+)\.")

HARMLESS: Mapping[str, str] = {
    r"rotary_emb\.inv_freq$": "computed from the config, and compared",
    r"(^|\.)(position_ids|token_type_ids)$": "counted, not learned, and compared",
    r"\.(attn|attention|self_attn|self_attention)\.(bias|masked_bias)$": "the causal mask; a bias has one dimension",
    r"(^|\.)embed_positions\.(weights|_float_tensor)$": "sinusoids, computed",
    r"(^|\.)(encoder|decoder)\.version$": "a number of the tool that trained it",
    r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$": "never read in T5",
    r"^final_logits_bias$": "of a model with a head, zero unless said",
    r"^rope_freqs\.weight$": "checked against the config",
}
"""Tensors that a checkpoint may hold though the model has no such parameter, and why that changes nothing."""

_HEADS = re.compile(
    r"^(?:(?:classifier|score|qa_outputs|pre_classifier|classification_head|cls|lm_head|predictions|sop_classifier|pooler"
    r"|vocab_(transform|layer_norm|projector)|generator_(predictions|lm_head)|discriminator_predictions|head"
    r"|lm_predictions|mask_predictions|seq_relationship|sequence_summary|multiple_choice_head|v_head)\.|decoder\.(?:weight|bias)$)"
)
"""Heads for other tasks than the base is loaded for; `lm_head` is one where the model has none."""


def tell(text: str) -> None:
    """Log a note for the user."""
    _LOG.warning("note: %s", text)


def match(tensors: Mapping[str, Any], config: Any, model_class: Any, given: str) -> dict[str, Any]:
    """The stored tensors by the model's names, with shapes and types checked against the config's.

    Raises:
        SourceError: see `find_names` and `check_shapes`; or a config that makes no model.
    """
    import torch
    from transformers import initialization

    try:
        with torch.device("meta"), initialization.no_init_weights():
            skeleton = model_class(config)
    except Exception as error:  # a foreign file: sizes that fit nothing raise nearly anything
        raise SourceError(f"the config of {given!r} makes no model: {one_line(error)}") from error
    found = find_names(tensors, skeleton.state_dict().keys(), skeleton.base_model_prefix, given)
    renamed = {found[name]: tensor for name, tensor in tensors.items()}
    check_shapes(renamed, skeleton, given)
    return renamed


def load(
    model_class: Any, config: Any, tensors: Mapping[str, Any], given: str, *, mapped: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A model in float32 with those tensors, and what transformers says of missing and unexpected ones.

    Args:
        model_class: Of transformers.
        config: Its config.
        tensors: By the model's names.
        given: The base as the user named it.
        mapped: Leave large matrices where they are mapped (`edgeprompt.base.mapped`), in the type they are stored in.

    Raises:
        SourceError: the tensors cannot be read.
    """
    if mapped:
        from edgeprompt.base.mapped import StandIns

        standing = StandIns()
        model, info = _from_pretrained(model_class, config, standing.instead(tensors), given)
        if standing.settle(model, set(info["unexpected_keys"]), tensors):
            return model, info
    return _from_pretrained(model_class, config, dict(tensors), given)


def _from_pretrained(model_class: Any, config: Any, tensors: dict[str, Any], given: str) -> tuple[Any, dict[str, Any]]:
    import torch

    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # foreign files: transformers and its readers raise nearly anything
        raise SourceError(f"cannot load the base model {given!r}: {one_line(error)}") from error
    return model, info


def find_names(stored: Collection[str], expected: Collection[str], prefix: str, given: str) -> dict[str, str]:
    """What the stored tensors are called in the model: names without what a wrapper put in front of them.

    Args:
        stored: Names in the file.
        expected: Names of the model's parameters and buffers.
        prefix: The model's `base_model_prefix`, which may be there or not.
        given: The base as the user named it.

    Returns:
        Stored name -> name. What was taken away is logged.

    Raises:
        SourceError: an adapter that was never merged, or two tensors that would have one name.
    """
    unmerged = next((name for name in stored if _UNMERGED.search(name)), None)
    if unmerged is not None:
        raise SourceError(
            f"{given!r} holds adapter weights that are not merged ({unmerged}); merge them first "
            "(PeftModel.merge_and_unload), or give the base without them"
        )
    best = {name: name for name in stored}
    most = _fit(best.values(), expected, prefix)
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    candidates = [plain]
    for _ in range(2):
        candidates += [
            {name: clean.removeprefix(lead) for name, clean in names.items()}
            for names in list(candidates)
            for lead in _LEADS
            if all(clean.startswith(lead) for clean in names.values())
        ]
    for names in candidates:
        fit = _fit(names.values(), expected, prefix)
        if fit > most:
            best, most = names, fit
    if len(set(best.values())) < len(best):
        seen: dict[str, str] = {}
        first, second = next((seen[new], old) for old, new in best.items() if seen.setdefault(new, old) != old)
        raise SourceError(f"{given!r} holds two tensors for one parameter: {first} and {second}; save the model again")
    changed = [(old, new) for old, new in best.items() if old != new]
    if changed:
        old, new = changed[0]
        tell(f"a wrapper's name was removed from {len(changed)} tensors of {given!r}: {old} is {new}")
    return best


def check_layers(stored: Iterable[str], layers: int, given: str) -> None:
    """Compare the number of layers in the file with the config's, before a model of that size is made.

    Raises:
        SourceError: the config has more, or fewer.
    """
    numbers = [int(found[1]) for name in stored if (found := _LAYER.search(name))]
    count = max(numbers) + 1 if numbers else 0
    if numbers and count != layers:
        raise SourceError(
            f"the config of {given!r} says {layers} layers, its weights have {count}; one of both files belongs to "
            "another model"
        )


def check_shapes(tensors: Mapping[str, Any], model: Any, given: str) -> None:
    """Compare stored shapes and types with a model's, before anything is read.

    Args:
        tensors: Stored tensors by the model's names.
        model: The model, on any device.
        given: The base as the user named it.

    Raises:
        SourceError: names tensors and both shapes.
    """
    for name, stored in tensors.items():  # heads and names of older transformers too, which this model does not list
        if not is_float(stored) and not _harmless(name):
            kind = stored.get_dtype() if hasattr(stored, "get_dtype") else stored.dtype
            raise SourceError(
                f"{name} of {given!r} is stored as {kind}: quantised weights without what they are scaled by; give the "
                "float checkpoint"
            )
    prefix = f"{model.base_model_prefix}."
    wrong = []
    for name, parameter in model.state_dict().items():
        stored = next(
            (tensors[key] for key in (name, name.removeprefix(prefix), prefix + name) if key in tensors), None
        )
        if stored is None:
            continue
        if shape_of(stored) != tuple(parameter.shape):
            wrong.append(f"{name} is {list(shape_of(stored))}, the config makes it {list(parameter.shape)}")
    if wrong:
        raise SourceError(
            f"{len(wrong)} tensors of {given!r} have other shapes than its config says: {_some(wrong, 2)}; one of both "
            "files belongs to another model"
        )


def check_loaded(info: Mapping[str, Any], model: Any, given: str, *, unused: Collection[str] | None = None) -> None:
    """Refuse a model with parameters that were not in its file, or a file with tensors that the model did not take.

    Args:
        info: What transformers tells with `output_loading_info`.
        model: The model.
        given: The base as the user named it.
        unused: The tensors that were not taken, where several loads share a file; None: those of `info`.

    Raises:
        SourceError: names the first tensors and how many there are.
    """
    mismatched = [
        f"{item[0]} is {list(item[1])}, the config makes it {list(item[2])}" for item in info.get("mismatched_keys", ())
    ]
    if mismatched:
        raise SourceError(
            f"{len(mismatched)} tensors of {given!r} have other shapes than its config says: {_some(mismatched, 2)}"
        )
    errors = list(info.get("error_msgs") or ())
    if errors:
        raise SourceError(f"cannot load the weights of {given!r}: {' '.join(str(errors[0]).split())[:300]}")
    missing = sorted(info["missing_keys"])
    left = sorted(info["unexpected_keys"] if unused is None else unused)
    strange = [name for name in left if not _harmless(name)]
    own = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    heads = [name for name in strange if _HEADS.match(name) and not (own and name.startswith("lm_head."))]
    strange = [name for name in strange if name not in heads]
    if missing or strange:
        raise SourceError(_complaint(given, type(model).__name__, missing, strange))
    if heads:
        tell(f"{given!r} holds a head for another task, which is left out: {_some(heads)}")


def check_kept(model: Any, tensors: Mapping[str, Any], given: str) -> None:
    """Refuse a file with a tensor whose values the model does not have: one that it ties to another, or a second one.

    transformers ties what its classes tie, and drops what a file has in the place of a tied tensor without a word. Of
    large tensors some rows are compared.

    Args:
        model: The model.
        tensors: Stored tensors by the model's names.
        given: The base as the user named it.

    Raises:
        SourceError: names the tensor.
    """
    import torch

    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for name, stored in tensors.items():
        if _harmless(name) and not _as_computed(name, stored, model):
            raise SourceError(
                f"{given!r} holds {name} with other values than {type(model).__name__} computes from its config; the "
                "config belongs to another model, or lacks what the checkpoint was trained with"
            )
        if not is_float(stored):
            continue
        kept = next((state[key] for key in (name, prefix + name, name.removeprefix(prefix)) if key in state), None)
        if kept is None and not name.endswith("final_logits_bias"):
            continue  # `check_loaded` has its word on it
        if kept is None:
            same = not bool(torch.as_tensor(stored[...]).any())
        elif shape_of(stored) != tuple(kept.shape):
            continue
        else:
            parts = ((torch.as_tensor(stored[rows]), kept[rows].cpu()) for rows in _samples(kept))
            # NaN is `check_values`' to tell.
            same = all(torch.equal(one.to(other.dtype).nan_to_num(), other.nan_to_num()) for one, other in parts)
        if not same:
            raise SourceError(
                f"{given!r} holds {name} with values of its own, and {type(model).__name__} has others there: it "
                "shares that tensor with another one, or the file has it twice; save the model again as it computes"
            )


def _as_computed(name: str, stored: Any, model: Any) -> bool:
    """Whether a tensor that no model has a place for says what the model computes in its place."""
    import torch

    if name.endswith(".bias"):
        return len(shape_of(stored)) != 1
    if name.endswith("position_ids"):
        return bool((torch.as_tensor(stored[...]).flatten().diff() == 1).all())
    if name.endswith("token_type_ids"):
        return not bool(torch.as_tensor(stored[...]).any())
    if not name.endswith("inv_freq"):
        return True
    found = torch.as_tensor(stored[...]).float().flatten()
    made = [value for place, value in model.named_buffers() if place.endswith("inv_freq")]
    rope = getattr(model.config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
    bases = {float(part["rope_theta"]) for part in parts if part.get("rope_theta")}
    # Before transformers 4.45 the buffer was that of the base alone, whatever scaled it later.
    made += [base ** (-torch.arange(len(found)) / len(found)) for base in bases]
    same = (one.shape == found.shape and torch.allclose(found, one.float(), rtol=0.02, atol=1e-6) for one in made)
    return not made or any(same)


def _samples(tensor: Any) -> list[Any]:
    """What to compare of a tensor: all of a small one, else some rows."""
    if tensor.dim() == 0 or tensor.numel() <= _SMALL:
        return [...]
    rows = len(tensor)
    return [slice(start, start + 1) for start in sorted({rows * part // 7 for part in range(7)} | {rows - 1})]


def check_made(model: Any, given: str) -> None:
    """Refuse a config that makes constants of the model (rotary frequencies) which are not finite.

    Raises:
        SourceError: names the constant.
    """
    import torch

    stored = model.state_dict().keys()
    for name, value in model.named_buffers():
        if name not in stored and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SourceError(f"the config of {given!r} makes {name} NaN or infinite; download it again")


def check_config_values(config: Any, given: str) -> None:
    """Refuse a config with a number that is none.

    Raises:
        SourceError: names it.
    """
    bad = next((name for name, value in config.to_dict().items() if isinstance(value, float) and value != value), None)
    if bad is not None:
        raise SourceError(f"the config of {given!r} says that {bad} is NaN; download it again")


def check_values(parameters: Iterable[tuple[str, Any]], given: str) -> None:
    """Refuse weights that are not finite, and say which matrices are all zero (a download with holes has such).

    Raises:
        SourceError: names the tensor.
    """
    import torch

    from edgeprompt.base.mapped import release

    zero = []
    for name, parameter in parameters:
        values = parameter.detach()
        if not bool(torch.isfinite(torch.sum(values, dtype=torch.float32))):
            raise SourceError(f"{name} of {given!r} holds NaN or infinity; download or train it again")
        # An all-zero row 0 tells nothing (padding), the last rows do: files are filled from the start.
        if values.dim() == 2 and min(values.shape) > 1 and not bool(values[-1].any()) and not bool(values.any()):
            zero.append(name)
        release(values)
    if zero:
        tell(f"{len(zero)} matrices of {given!r} are all zero: {_some(zero)}")


def _harmless(name: str) -> bool:
    return any(re.search(pattern, name) for pattern in HARMLESS)


def _fit(names: Iterable[str], expected: Collection[str], prefix: str) -> int:
    front = f"{prefix}."
    known = set(expected) | {name.removeprefix(front) for name in expected}
    if not any(name.startswith(front) for name in expected):
        known |= {front + name for name in expected}
    return len(known & set(names))


def _complaint(given: str, model: str, missing: Sequence[str], strange: Sequence[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors that {model} needs ({_some(missing)})")
    if strange:
        parts.append(f"holds {len(strange)} that it has no place for ({_some(strange)})")
    advice = "the checkpoint is incomplete, or its config belongs to another model"
    if missing and strange:
        advice = "its names are not those that transformers writes: save it again with save_pretrained"
    elif missing == ["lm_head.weight"]:
        advice = "give a checkpoint with its language-model head, or set tie_word_embeddings if it shares the embedding"
    return f"{given!r} {' and '.join(parts)}; {advice}"


def _some(items: Sequence[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
