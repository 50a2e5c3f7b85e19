"""The base fingerprint: the same for one base however it was loaded (float32, float16, bfloat16, from GGUF).

Format 3 covers every matrix and bias by the sign bits of all its values, which no float format changes; every parameter
(norms too) by its size and a few signed sums of its values rounded to bfloat16; and the config's values that change
what the base computes. Formats 1 and 2, of earlier prompts and packages, cover less (`edgeprompt.package.fingerprint`).
Fingerprints protect from mistakes; they are no signature.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.base.geometry import geometry_of, text_config
from edgeprompt.errors import SourceError
from edgeprompt.package import fingerprint as parts
from edgeprompt.package import strict_json
from edgeprompt.package.manifest import Geometry

_ROWS = 256
_CHUNK_VALUES = 1 << 22
_BY_LENGTH = ("dynamic", "yarn", "longrope")
"""Scalings of rotary positions that read `max_position_embeddings`."""
_KNOWN = "edgeprompt_known_values"
"""Attribute of a model whose config came from a file that tells some values alone."""
_LAYER = re.compile(r"\.(\d+)\.")
_SINUSOIDS = 0.005
"""Most that rounding to bfloat16 changes a sine."""
BUFFER = "buffer:"
"""In front of the names of buffers, which formats 1 and 2 leave out."""
_HARMLESS_BUFFER = re.compile(
    r"(?:inv_freq|position_ids|token_type_ids|(?:masked_)?bias|positions\.weights?|cos|sin|_float_tensor)$"
)
_LOGITS_BIAS = parts.LOGITS_BIAS
"""What BART and its relatives add to all logits."""
_NO_FACT = re.compile(
    r"^_(?!sliding)|dropout|drop$|pdrop|layerdrop|^init|initializer|_token_id$|_token_ids$|^num_labels$|label|^output_"
    r"|^summary_|^classifier_|^problem_type$|^architectures$|version$|^dtype$|^torch_dtype$|^use_cache$|^return_dict$"
    r"|^chunk_size|^is_encoder_decoder$|^tie_|^vocab_size$|hidden_size$|intermediate_size$|^num_(?:hidden_)?layers$"
    r"|^n_(?:layer|embd|head|inner|positions|ctx)s?$|^(?:d_model|d_ff|d_kv|dim|hidden_dim|n_layers|n_heads)$"
    r"|^num_(?:decoder_layers|heads|attention_heads|key_value_heads|kv_heads)$|ffn_dim$|^head_dim$"
    r"|^(?:encoder|decoder)_layers$|^max_seq_len$|^seq_length$|^max_window_layers$|^use_sliding_window$"
    r"|sliding_window_pattern$|^no_rope_layer_interval$|^pretraining_tp$|^model_type$|^attn_impl|^init_device$"
    r"|^type_vocab_size$|^embedding_size$|^word_embed_proj_dim$|^rotary_emb|^reorder_and_upcast|^slow_but_exact$"
    r"|^router_|_loss|^deterministic|^sparse_pred|^legacy$|^pooler_hidden_size$|^is_llama_config$|^max_length$"
    r"|^ffn_hidden_size$|^expansion_ratio$|^norm_type$|^prefix_lm$|^gradient_checkpointing$|^torchscript$"
    r"|^max_position_embeddings$|^(?:attention|mlp|enable|norm|decoder)_bias$|^bias$|^no_bias$|^add_cross_attention$"
)
"""Config values that change nothing of what a base computes, or that its tensors or format 1 tell."""


def base_fingerprint(model: Any) -> str:
    """Fingerprint a transformers model: geometry, config, and the signs and magnitudes of its parameters.

    The order of parameters does not count. Heads for other tasks than language modelling are left out, and so are rows
    of padding behind `vocab_size`.

    Args:
        model: A transformers model, or a PEFT model around one.

    Raises:
        SourceError: a parameter has values that are not finite.

    Returns:
        "sha256-3:" and its parts (`edgeprompt.package.fingerprint`).
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = text_config(model.config)
    geometry = geometry_of(config)
    rows = sampled_rows(geometry.vocab_size)
    sample = model.get_input_embeddings().weight.detach()[rows].float().cpu().numpy()
    first = fingerprint_of(config.model_type, geometry, sample)
    read = [(name, Digest(value, name)) for name, value in _covered(model, geometry.vocab_size)]
    known = getattr(model, _KNOWN, None)
    facts = config_facts(config) | _masked_head(model) | _logits_bias(model)
    return joined_fingerprint(first, read, facts if known is None else facts | {parts.KNOWN: dict(known)})


def note_known(model: Any, names: Collection[str]) -> None:
    """Note on a model which values of its config its file tells; fingerprints take the others as unknown.

    Args:
        model: A transformers model.
        names: Of config values, with points inside `rope_parameters`; sizes and bookkeeping among them are left out.
    """
    values = dict(parts.flat(_plain(text_config(model.config).to_dict())))
    setattr(model, _KNOWN, {name: values[name] for name in names if name in values})


class Digest:
    """What a fingerprint holds of one parameter."""

    def __init__(self, values: Any, name: str = "") -> None:
        """Read a tensor once, in parts; a mapped one gives its memory back.

        Raises:
            SourceError: the parameter of that name has values that are not finite, so the base computes nothing.
        """
        import torch

        from edgeprompt.base.mapped import release

        self.dim = values.dim()
        signs = hashlib.sha256(str(list(values.shape)).encode())
        flat = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(-1, 1)
        columns = _random_signs(flat.shape[1], 1 << 40)  # others than the rows have
        sums, squares, kind = np.zeros(parts.PROJECTIONS), 0.0, parts.BFLOAT16
        rows = max(1, _CHUNK_VALUES // max(1, flat.shape[1]))
        for start in range(0, len(flat), rows):
            part = flat[start : start + rows]
            signs.update(np.packbits(torch.signbit(part).cpu().numpy().ravel()).tobytes())
            rounded = part.bfloat16()
            kind = max(kind, _kind(part, rounded))
            exact = rounded.double()
            squares += float(torch.linalg.vector_norm(exact)) ** 2
            beside = _random_signs(len(part), start)
            sums += (beside * (exact @ torch.from_numpy(columns).to(exact.device)).cpu().numpy()).sum(axis=0)
            release(part)
        self.signs = signs.hexdigest()
        self.entry = np.zeros((), parts.ENTRY)
        self.entry["kind"] = kind
        if not math.isfinite(squares):
            raise SourceError(f"the base's parameter {name!r} has values that are NaN or infinite; get the base again")
        if squares:
            norm = math.sqrt(squares)
            size = round((math.log2(norm / math.sqrt(flat.numel())) + 32) * parts.NORM_STEPS)
            self.entry["norm"] = min(max(size, 1), 65535)
            self.entry["sums"] = np.clip(np.rint(sums / norm * parts.PROJECTION_STEPS), -32767, 32767)


def joined_fingerprint(first: str, read: Collection[tuple[str, Digest]], facts: Mapping[str, Any]) -> str:
    """The fingerprint of format 3.

    Args:
        first: Of format 1.
        read: Every parameter by its name, without what a model with a head puts in front.
        facts: Of the config (`config_facts`).
    """
    named = {parameter_name(name): digest for name, digest in read}
    lines = {f"{_layer(name)}:{one.signs}" for name, one in read if _covers_signs(name, one)}
    text = "\n".join([first, *sorted(lines)])
    order = sorted(named)
    entries = np.array([named[name].entry for name in order], parts.ENTRY)
    return parts.build(first, hashlib.sha256(text.encode()).hexdigest(), facts, "\n".join(order).encode(), entries)


def _covers_signs(name: str, one: Digest) -> bool:
    """Whether format 2 has a parameter: matrices and biases."""
    return not name.startswith(BUFFER) and (one.dim > 1 or name.endswith("bias"))


def parameter_name(name: str) -> str:
    """A parameter's place: encoder or decoder, number of the layer, and its name there; its whole name elsewhere."""
    steps = name.split(".")
    number = next((index for index, step in enumerate(steps) if step.isdigit()), None)
    if number is None:
        return name
    side = [step for step in steps[:number] if step in ("encoder", "decoder")][:1]
    return ".".join([*side, *steps[number:]])


def sampled_rows(vocab_size: int) -> list[int]:
    """Which rows of the embedding format 1 hashes; rows behind `vocab_size` are padding that some loaders add."""
    return sorted({index * vocab_size // _ROWS for index in range(_ROWS)})


def fingerprint_of(model_type: str, geometry: Geometry, sample: npt.NDArray[Any]) -> str:
    """The fingerprint of format 1, from its parts: all that a graph's embedding can give.

    Args:
        model_type: As transformers calls it.
        geometry: The base's sizes.
        sample: `sampled_rows` of the unquantised embedding, [rows, width].

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    facts = {
        "model_type": model_type,
        "vocab_size": geometry.vocab_size,
        "hidden_size": geometry.hidden_size,
        "num_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_key_value_heads,
        "head_size": geometry.head_size,
    }
    signs = np.packbits(sample > 0)
    return "sha256:" + hashlib.sha256(strict_json.dumps(facts).encode() + b"\n" + signs.tobytes()).hexdigest()


def config_facts(config: Any) -> dict[str, Any]:
    """The values of a config that change what a base computes and are not the defaults of its class.

    Keys that the class does not know are left out (no model reads them), and so are sizes, which the tensors have.
    Values that are false or null where the default is neither stand by their names in `SWITCHED_OFF`.
    """
    config = text_config(config)
    try:
        usual = type(config)().to_dict()
    except Exception:  # a class that needs arguments has no defaults
        usual = {}
    given = config.to_dict()
    plain, defaults = _plain(given), _plain(usual)
    facts = {
        name: value for name, value in plain.items() if (name in usual or not usual) and value != defaults.get(name)
    }
    off = {name for name in defaults.keys() - plain.keys() if name in given}
    types = given.get("layer_types")
    facts.pop("layer_types", None)
    if types and len(set(types)) > 1:
        facts["layer_types"] = "".join(str(one)[0] for one in types)  # f(ull), s(liding), c(hunked)
    elif types and types[0] == "full_attention":
        facts.pop("sliding_window", None)
        off.discard("sliding_window")
    elif types:
        facts["layer_types"] = str(types[0])
    rope = given.get("rope_parameters") or {}
    if any(one.get("rope_type") in _BY_LENGTH for one in (rope, *_dicts(rope))):
        facts["max_position_embeddings"] = given.get("max_position_embeddings")
    if offset := geometry_of(config).position_offset:
        facts["position_offset"] = offset
    return facts | {parts.SWITCHED_OFF: sorted(off)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values in a form that does not depend on the file they come from; no bookkeeping, no sizes."""
    found = {}
    for name, value in values.items():
        if _NO_FACT.search(str(name)):
            continue
        if isinstance(value, Mapping):
            value = _plain(value)
        elif isinstance(value, (list, tuple)):
            value = [_number(one) for one in value]
        value = _number(value)
        if value is not None and value is not False and value not in ({}, []):
            found[str(name)] = value
    return found


def _number(value: Any) -> Any:
    if isinstance(value, float):
        value = float(f"{value:.5g}") if math.isfinite(value) else str(value)  # GGUF files hold float32
        return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
    return value if value is None or isinstance(value, (bool, int, str, dict, list)) else str(value)


def _dicts(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (one for one in values.values() if isinstance(one, Mapping))


def _covered(model: Any, vocab_size: int) -> Iterator[tuple[str, Any]]:
    """(name, values) of every parameter and learned buffer, each once however often it is tied."""
    tables = [model.get_input_embeddings().weight]
    parameters = dict(model.base_model.named_parameters())
    head = model.get_output_embeddings() if hasattr(model, "can_generate") and model.can_generate() else None
    if head is not None:
        tables.append(head.weight)
        parameters |= {f"head.{name}": value for name, value in head.named_parameters()}
    buffers = dict(model.named_buffers())
    for name in model.state_dict():
        if (value := buffers.get(name)) is None or not value.is_floating_point():
            continue
        added = name.endswith(_LOGITS_BIAS) and bool(value.any())  # zero where a base has none
        if added or not _HARMLESS_BUFFER.search(name):
            parameters[BUFFER + name] = value
    computed = {
        id(value)
        for module in model.modules()
        if "Sinusoidal" in type(module).__name__
        for value in module.parameters()
        if _is_computed(value.detach())
    }
    seen = set(computed)
    for name, value in parameters.items():
        if id(value) in seen or not value.numel():
            continue
        seen.add(id(value))
        cut = any(value is table for table in tables)
        yield name, value.detach()[:vocab_size] if cut else value.detach()


def _is_computed(table: Any) -> bool:
    """Whether a table of positions holds Marian's and Pegasus' sinusoids, as any float type rounds them.

    Files may lack it, so it is left out then; a file with another table has a parameter like others.
    """
    import torch

    rows, width = table.shape
    columns = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (2 * (columns // 2) / width)
    sinusoids = torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=1)
    return bool((table.double().cpu() - sinusoids).abs().max() <= _SINUSOIDS)


def _masked_head(model: Any) -> dict[str, str]:
    """A masked language model's head, without the embedding that it shares: a hash of its signs, and its sizes."""
    if not type(model).__name__.endswith("ForMaskedLM"):
        return {}
    inside = {id(value) for value in model.base_model.parameters()}
    read = [Digest(value.detach()) for value in model.parameters() if id(value) not in inside]
    read.sort(key=lambda one: one.signs)
    text = "\n".join(one.signs for one in read)
    return {
        parts.MASKED_HEAD: hashlib.sha256(text.encode()).hexdigest()[:16],
        parts.MASKED_SIZES: parts.packed_sizes(np.array([one.entry for one in read], parts.ENTRY)),
    }


def _logits_bias(model: Any) -> dict[str, bool]:
    """Whether a bias of all logits is not zero, where a base has one."""
    found = [value for name, value in model.named_buffers() if name.endswith(_LOGITS_BIAS)]
    return {parts.LOGITS_BIAS: any(bool(value.any()) for value in found)} if found else {}


def _layer(name: str) -> str:
    found = _LAYER.search(f".{name}")
    return found[1] if found else ""


def _kind(part: Any, rounded: Any) -> int:
    import torch

    if part.dtype == torch.bfloat16 or torch.equal(rounded.float(), part.float()):
        return parts.BFLOAT16
    if part.dtype == torch.float16 or torch.equal(part.half().float(), part.float()):
        return parts.FLOAT16
    return parts.FLOAT32


def _random_signs(count: int, start: int) -> npt.NDArray[np.float64]:
    """+1 and -1 for indices from `start`, [count, PROJECTIONS]: bits of splitmix64, the same everywhere for ever."""
    with np.errstate(over="ignore"):
        mixed = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    bits = (mixed[:, None] >> np.arange(parts.PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
    return bits.astype(np.float64) * 2 - 1
