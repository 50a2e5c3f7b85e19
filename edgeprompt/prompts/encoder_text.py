"""What an encoder reads: ids, segments, and where each token stands in the request's text.

Tagging and question answering need the characters behind a token; pairs need the tokenizer's own way to join two
texts. Both the runtime and tuning encode through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprompt.errors import InputError, TemplateError
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.template import Literal, Slot, Template, VirtualTokens, as_fields
from edgeprompt.request import Request

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class EncodedText:
    """One request's tokens; virtual ones, in front, included."""

    ids: list[int]
    type_ids: list[int]
    """Segment of every token: 0, and 1 for the second text of a pair."""
    offsets: list[tuple[int, int] | None]
    """Characters that a token covers in the field asked for; None for tokens of anything else."""


def fields_of(request: Request) -> Mapping[str, str]:
    """The texts of a request whose words are labelled or searched, by slot.

    Raises:
        InputError: it has ids instead of a text.
    """
    if request.input_ids is not None:
        raise InputError("words can only be found in a text; give text instead of input_ids")
    return as_fields(request.text)


def pair_slots(template: Template) -> tuple[str, str] | None:
    """The two slots of a template that is nothing but a pair (`"{prompt}{question}{context}"`), else None."""
    match template.without_prompt().parts:
        case (Slot(first), Slot(second)):
            return first, second
    return None


def located_slot(template: Template) -> str:
    """The field that tags or answers are looked up in: the second of a pair, `context` or `text`, else the last."""
    if pair := pair_slots(template):
        return pair[1]
    return next((name for name in ("context", "text") if name in template.slots), template.slots[-1])


def pair_of(template: Template) -> tuple[str, str]:
    """The slots of a template that a question and its context fill.

    Raises:
        InputError: it has others than two.
    """
    context = located_slot(template)
    others = [name for name in template.slots if name != context]
    if len(others) != 1:
        raise InputError(f"the template {str(template)!r} has slots {', '.join(template.slots)}; a question needs two")
    return others[0], context


def encode_text(
    template: Template,
    tokenizer: Tokenizer,
    fields: Mapping[str, str],
    *,
    num_virtual_tokens: int,
    first_virtual_id: int,
    max_length: int | None = None,
    truncate: bool = False,
    add_special_tokens: bool = True,
    locate: str | None = None,
) -> EncodedText:
    """Encode a request for an encoder.

    A template of two slots with nothing between them is a pair: the tokenizer joins the texts, with its separator and
    segments. Every other template is encoded by `Template.encode`.

    Args:
        template: The prompt's template.
        tokenizer: The package's tokenizer.
        fields: Slot name -> text.
        num_virtual_tokens: How many virtual tokens the prompt has; 0 for none and for prefixes.
        first_virtual_id: Id of the first one.
        max_length: Most ids allowed, virtual tokens included; None: no limit.
        truncate: Whether the last slot is cut where the limit is exceeded.
        add_special_tokens: Whether the tokenizer adds its own.
        locate: The field whose tokens get offsets; None: no offsets are needed.

    Raises:
        InputError: a field is missing, or the request is too long.
        TemplateError: offsets are asked for, and virtual tokens stand inside the text.
    """
    missing = [name for name in template.slots if name not in fields]
    if missing:
        raise InputError(
            f"the template {str(template)!r} needs {missing[0]!r}; given: {', '.join(map(str, fields)) or 'nothing'}"
        )
    virtual = list(range(first_virtual_id, first_virtual_id + num_virtual_tokens))
    last = template.slots[-1]
    fields = dict(fields)
    while True:
        if pair := pair_slots(template):
            with template.naming_parts(tokenizer, fields):
                encoded = _pair(pair, tokenizer, fields, virtual, add_special_tokens, locate)
        elif locate is not None:
            with template.naming_parts(tokenizer, fields):
                encoded = _located(template, tokenizer, fields, virtual, add_special_tokens, locate)
        else:
            ids = template.encode(
                tokenizer,
                fields,
                num_virtual_tokens=num_virtual_tokens,
                first_virtual_id=first_virtual_id,
                add_special_tokens=add_special_tokens,
            )
            encoded = EncodedText(ids, [0] * len(ids), [None] * len(ids))
        over = 0 if max_length is None else len(encoded.ids) - max_length
        if over <= 0:
            return encoded
        tokens = len(tokenizer.encode(fields[last], add_special_tokens=False))
        if not truncate:
            raise InputError(
                f"the text takes {len(encoded.ids)} tokens with its prompt and template, at most {max_length} fit; "
                "shorten it, or ask for truncation"
            )
        if tokens == 0:
            raise InputError(
                f"the template's fixed parts and prompt take {len(encoded.ids)} tokens; at most {max_length} fit"
            )
        fields[last] = tokenizer.truncate(fields[last], max(0, tokens - over))


def words_of(text: str) -> list[tuple[int, int]]:
    """Where the words of a text stand, in characters: what stands between white space."""
    return [match.span() for match in _WORD.finditer(text)]


def first_tokens(words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int] | None]) -> list[int | None]:
    """For every word the index of its first token, None where truncation or the tokenizer dropped it."""
    found: list[int | None] = []
    token = 0
    for start, end in words:
        while token < len(offsets) and not _reaches(offsets[token], start):
            token += 1
        span = offsets[token] if token < len(offsets) else None
        found.append(token if span is not None and span[0] < end else None)
    return found


def _reaches(span: tuple[int, int] | None, start: int) -> bool:
    return span is not None and span[1] > start


def _pair(
    slots: tuple[str, str],
    tokenizer: Tokenizer,
    fields: Mapping[str, str],
    virtual: list[int],
    special: bool,
    locate: str | None,
) -> EncodedText:
    ids, offsets, type_ids, sequence = tokenizer.encode_pair(
        fields[slots[0]], fields[slots[1]], add_special_tokens=special
    )
    wanted = slots.index(locate) if locate in slots else None
    found = [
        span if part is not None and part == wanted else None for span, part in zip(offsets, sequence, strict=True)
    ]
    return EncodedText([*virtual, *ids], [0] * len(virtual) + type_ids, [*[None] * len(virtual), *found])


def _located(
    template: Template, tokenizer: Tokenizer, fields: Mapping[str, str], virtual: list[int], special: bool, locate: str
) -> EncodedText:
    if not template.prompt_is_prefix:
        raise TemplateError(f"template {str(template)!r}: tagging and questions need the virtual tokens in front")
    joined, start = "", 0
    for part in template.parts:
        if isinstance(part, Slot) and part.name == locate:
            start = len(joined)
        match part:
            case Literal(text):
                joined += text
            case Slot(name):
                joined += fields[name]
            case VirtualTokens():
                pass
            case _:
                joined += tokenizer.mask_token or ""
    end = start + len(fields[locate])
    ids, offsets = tokenizer.encode_with_offsets(joined, add_special_tokens=special)
    found = [
        (max(low, start) - start, min(high, end) - start) if low < end and high > start and high > low else None
        for low, high in offsets
    ]
    none: list[tuple[int, int] | None] = [None] * len(virtual)
    return EncodedText([*virtual, *ids], [0] * (len(virtual) + len(ids)), none + found)
