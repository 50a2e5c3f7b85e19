"""A base's generation_config: what the runtime carries out, and what of it answers here do without."""

from __future__ import annotations

from typing import Any

from edgeprompt import names
from edgeprompt.errors import SourceError
from edgeprompt.package.generation import COUNTS, NUMBERS, TOKEN_LISTS, TOKEN_SEQUENCES, TOKENS, check_generation

_UNSUPPORTED = (
    "constraints", "diversity_penalty", "dola_layers", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "force_words_ids", "forced_decoder_ids", "guidance_scale", "penalty_alpha",
    "remove_invalid_values", "sequence_bias", "stop_strings", "token_healing", "watermarking_config",
)  # fmt: skip
"""Fields that change a greedy answer, and that the runtime does not carry out."""
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
        if name in TOKEN_LISTS:
            value = [token for token in ([value] if isinstance(value, int) else list(value)) if token != -1]
        elif name in TOKEN_SEQUENCES:
            value = [list(sequence) for sequence in value]
        found[name] = value
    try:
        check_generation(found)
    except ValueError as error:
        raise SourceError(f"the base's generation_config is not usable: {error}") from error
    notes = []
    for name in _UNSUPPORTED:
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
