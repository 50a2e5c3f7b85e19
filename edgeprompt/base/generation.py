"""A base's generation_config: what the runtime carries out, and what of it answers here do without."""

from __future__ import annotations

from typing import Any

from edgeprompt import names
from edgeprompt.base.geometry import text_config
from edgeprompt.errors import SourceError
from edgeprompt.package.generation import (
    BEAMS,
    COUNTS,
    FIELDS,
    NUMBERS,
    TOKEN_LISTS,
    TOKEN_SEQUENCES,
    TOKENS,
    check_generation,
)

_UNSUPPORTED = (
    "constraints", "diversity_penalty", "dola_layers", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "force_words_ids", "forced_decoder_ids", "guidance_scale", "penalty_alpha",
    "max_time", "remove_invalid_values", "sequence_bias", "stop_strings", "token_healing", "watermarking_config",
)  # fmt: skip
"""Fields that change a greedy answer, and that the runtime does not carry out."""
_HARMLESS = (
    # Lengths, which a request gives; beams, sampling and special tokens, which are told or carried elsewhere.
    "max_length", "max_new_tokens", "num_beams", "early_stopping", "length_penalty", "num_beam_groups", "do_sample",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "num_return_sequences",
    # How model.generate works and what it returns, not what it says.
    "use_cache", "use_mtp", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size", "renormalize_logits", "transformers_version",
)  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, [], {}, ())
_ONE = ("encoder_repetition_penalty", "guidance_scale")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def generation_of(config: Any, generation_config: Any, architecture: str) -> tuple[dict[str, Any], list[str]]:
    """The manifest's `generation`, and a line for each thing that `model.generate` does by default and the runtime not.

    Sampling is not carried over: answers are greedy unless a request asks for sampling, as `model.generate` with
    `do_sample=False`.

    Args:
        config: The base's config, where checkpoints of old keep generation fields.
        generation_config: Its generation config; None: the base has none.
        architecture: One of `names.ARCHITECTURES`.

    Raises:
        SourceError: a field has a value of the wrong kind.
    """
    if architecture == names.ENCODER_ONLY:
        return {}, []

    def find(name: str) -> Any:
        value = getattr(generation_config, name, None)
        return getattr(config, name, None) if value is None else value

    found: dict[str, Any] = {}
    for name in (*NUMBERS, *COUNTS, *TOKENS, *TOKEN_LISTS, *TOKEN_SEQUENCES):
        value = find(name)
        if value is None or value == NUMBERS.get(name, 0 if name in COUNTS else []):
            continue
        # What is of another kind stays as it is, and is refused below.
        if name in TOKEN_LISTS and isinstance(value, (int, list, tuple)):
            value = [token for token in ([value] if isinstance(value, int) else value) if token != -1]
        elif name in TOKEN_SEQUENCES and isinstance(value, (list, tuple)):
            value = [list(sequence) if isinstance(sequence, tuple) else sequence for sequence in value]
        found[name] = value
    if architecture == names.ENCODER_DECODER:
        found |= {name: value for name, usual in BEAMS.items() if (value := find(name)) not in (None, usual)}
    try:
        check_generation(found)
        size = text_config(config).vocab_size
        for name in (*TOKENS, *TOKEN_LISTS, *TOKEN_SEQUENCES):
            for token in _flat(found.get(name, [])):
                if token >= size:
                    raise ValueError(f"{name} has {token}, and the base has {size} tokens")
    except ValueError as error:
        raise SourceError(f"the base's generation_config is not usable: {error}") from error
    notes = []
    known = (*FIELDS, *_HARMLESS, *_SAMPLING, *_UNSUPPORTED)
    fields = vars(generation_config) if generation_config is not None else {}
    unknown = [name for name in fields if name not in known and not name.startswith("_")]
    for name in (*_UNSUPPORTED, *sorted(unknown)):
        value = find(name)
        if value not in _NEUTRAL and not (name in _ONE and value == 1):
            notes.append(f"{name}={value!r} is not carried out: answers may differ from model.generate")
    beams = find("num_beams") or 1
    if beams > 1:
        how = (
            "decoders here answer without beams"
            if architecture == names.DECODER_ONLY
            else f"answers here take the best token unless --num-beams {beams} is given"
        )
        notes.append(f"num_beams={beams}: model.generate searches with beams by default; {how}")
    if find("do_sample"):
        said = ", ".join(f"{name}={value}" for name in _SAMPLING if (value := find(name)) is not None)
        notes.append(
            f"do_sample{f' ({said})' if said else ''}: answers here are greedy unless a request asks to sample"
        )
    return found, notes


def _flat(tokens: int | list[Any]) -> list[int]:
    return [one for token in tokens for one in _flat(token)] if isinstance(tokens, list) else [tokens]
