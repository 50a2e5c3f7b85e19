"""What a base's generation_config says of every answer: the part that the runtime carries out, checked.

Fields have transformers' own names and meanings. Fields that are not there change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeprompt.package.strict_json import check_type

NUMBERS: Mapping[str, float] = {"repetition_penalty": 1.0}
"""Field -> the value that changes nothing."""
COUNTS = ("no_repeat_ngram_size", "min_length", "min_new_tokens")
TOKENS = ("forced_bos_token_id",)
TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
TOKEN_SEQUENCES = ("bad_words_ids",)
FIELDS = (*NUMBERS, *COUNTS, *TOKENS, *TOKEN_LISTS, *TOKEN_SEQUENCES)
BEAMS: Mapping[str, Any] = {"length_penalty": 1.0, "early_stopping": False}
"""Fields of beam search alone -> the value that is the default."""


def check_generation(data: object) -> dict[str, Any]:
    """The manifest's `generation` object.

    Raises:
        ValueError: no object, an unknown field, or a value of another type or range.
    """
    found = check_type(data, dict, "generation")
    for name, value in found.items():
        where = f"generation.{name}"
        if name in NUMBERS:
            if not 0 < check_type(value, (int, float), where) < math.inf:
                raise ValueError(f"{where} is {value}, it must be a finite number of more than 0")
        elif name in COUNTS or name in TOKENS:
            _least_zero(value, where)
        elif name in TOKEN_LISTS:
            _tokens(value, where)
        elif name in TOKEN_SEQUENCES:
            for sequence in check_type(value, list, where):
                if not _tokens(sequence, where):
                    raise ValueError(f"{where} has an empty list")
        elif name == "length_penalty":
            if not math.isfinite(check_type(value, (int, float), where)):
                raise ValueError(f"{where} is {value}, it must be a finite number")
        elif name == "early_stopping":
            if not isinstance(value, bool) and value != "never":
                raise ValueError(f"{where} is {value!r}, it must be true, false or 'never'")
        else:
            raise ValueError(f"generation has unknown key {name!r}; known: {', '.join((*FIELDS, *BEAMS))}")
    _check_forced(found)
    return dict(found)


def _check_forced(found: Mapping[str, Any]) -> None:
    """Refuse a token that must come and may not: nothing would be left to answer with.

    `bad_words_ids` and `begin_suppress_tokens` are not meant: transformers forces tokens behind the former, and the
    latter begins behind a forced first token.
    """
    never = found.get("suppress_tokens", ())
    bos = found.get("forced_bos_token_id")
    for name, forced in (
        ("forced_bos_token_id", [] if bos is None else [bos]),
        ("forced_eos_token_id", found.get("forced_eos_token_id", [])),
    ):
        if forced and all(token in never for token in forced):
            raise ValueError(
                f"{name} forces token {forced[0]}, which suppress_tokens forbids, so no token is left to answer with; "
                "remove it from one of them"
            )


def _tokens(value: object, where: str) -> list[int]:
    found: list[int] = check_type(value, list, where)
    for token in found:
        _least_zero(token, where)
    return found


def _least_zero(value: object, where: str) -> None:
    if check_type(value, int, where) < 0:
        raise ValueError(f"{where} has {value}, it must be at least 0")
