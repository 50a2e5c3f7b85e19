"""OpenPrompt's template language, as far as prompt files express it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from edgeprompt import names
from edgeprompt.errors import InputError, TemplateError
from edgeprompt.prompts.template import Literal, Mask, Part, Slot, Template, VirtualTokens
from exporters.importers.foreign import BaseFacts


@dataclass(frozen=True)
class ReadTemplate:
    """A template whose soft tokens have ids, as OpenPrompt numbers them (from 1)."""

    parts: tuple[Part, ...]
    soft_ids: tuple[int, ...] = ()
    """For every place of a soft token its id; a reused soft_id occurs twice. Empty: `{prompt}` takes them all."""
    specials: tuple[str, str] = ("", "")
    """Texts of the special tokens around everything; OpenPrompt puts them around soft tokens too."""
    skipped: int = 0
    """Soft tokens that OpenPrompt has parameters for and never feeds to a causal model."""

    @property
    def places(self) -> int:
        """How many virtual tokens the template places."""
        return sum(part.count or 0 for part in self.parts if isinstance(part, VirtualTokens))

    @property
    def adds_specials(self) -> bool:
        """Whether the tokenizer still adds its special tokens itself."""
        return not self.specials[0]

    def scattered(self) -> Template:
        """The template of a MixedTemplate or PtuningTemplate."""
        before, after = self.specials if self.specials[0] else ("", "")
        parts = [*([Literal(before)] if before else []), *self.parts, *([Literal(after)] if after else [])]
        return Template(tuple(parts)).checked()

    def in_front(self) -> Template:
        """The template of a SoftTemplate, whose soft tokens come before everything, special tokens included."""
        if any(isinstance(part, VirtualTokens) for part in self.parts):
            if self.soft_ids:
                raise InputError("a SoftTemplate or prefix stands in front; its template has no soft tokens")
            return Template(self.parts).checked()
        return Template((VirtualTokens(), *self.parts)).checked()


def read_template(text: str | None, base: BaseFacts | None) -> ReadTemplate | None:
    """Read `--template`: OpenPrompt's language if it has a quoted key, else ours.

    Raises:
        TemplateError: it does not parse, or says what a prompt file cannot.
    """
    if text is None:
        return None
    if '{"' not in text and "{'" not in text:
        parts = Template.parse(text).parts
        counts = [part.count for part in parts if isinstance(part, VirtualTokens)]
        ids = () if None in counts else tuple(range(1, sum(count or 0 for count in counts) + 1))
        return ReadTemplate(parts, ids, _specials(base))
    pieces = _pieces(text)
    slots = {piece["placeholder"] for piece in pieces if "placeholder" in piece}
    parts_found: list[Part] = []
    soft_ids: list[int] = []
    named: dict[int, list[int]] = {}
    fresh, skipped = 0, set[int]()
    for piece in pieces:
        if "soft" in piece or "soft_id" in piece:
            mine, fresh = _soft(piece, named, fresh, base)
            if piece.get("soft") is None and base and base.architecture == names.DECODER_ONLY:
                skipped |= set(mine)  # OpenPrompt's wrapper for causal models drops parts without text, these too
                continue
            soft_ids += mine
            parts_found.append(VirtualTokens(len(mine)))
        elif "mask" in piece:
            if base is None or base.architecture == names.ENCODER_ONLY:
                parts_found.append(Mask())
                continue
            if base.architecture == names.ENCODER_DECODER:
                parts_found.append(Literal("<extra_id_0>"))
                continue
            break  # OpenPrompt's wrapper for causal models ends the input at the mask
        else:
            parts_found += _plain(piece, slots)
    return ReadTemplate(tuple(parts_found), tuple(soft_ids), _specials(base), len(skipped))


def _plain(piece: dict[str, Any], slots: set[str]) -> list[Part]:
    space = piece["space"]
    if "text" in piece:
        return [Literal(space + piece["text"])]
    if "placeholder" in piece or "meta" in piece:
        name = str(piece.get("placeholder", piece.get("meta")))
        slot = "text" if slots == {name} else name
        return [*([Literal(space)] if space else []), Slot(slot)]
    raise TemplateError(
        f"OpenPrompt's template part {piece} cannot be converted; write the template as '{{prompt}}{{text}}'"
    )


def _soft(
    piece: dict[str, Any], named: dict[int, list[int]], fresh: int, base: BaseFacts | None
) -> tuple[list[int], int]:
    known = piece.get("soft_id")
    if known in named:
        return named[known], fresh
    if piece.get("soft") is None:
        count = piece.get("duplicate", 1)
    else:
        if base is None or base.tokenizer is None:
            raise TemplateError("soft tokens that start from words need --base with a tokenizer to be counted")
        words = piece["space"] + str(piece["soft"])
        count = len(base.tokenizer.encode(words, add_special_tokens=False))
    if not isinstance(count, int) or not 0 < count < 1 << 16:
        raise TemplateError(f"a soft part of OpenPrompt's template has {count!r} tokens")
    same = piece.get("soft") is None and bool(piece.get("same"))  # one soft token, as often as "duplicate" says
    ids = [fresh + 1] * count if same else list(range(fresh + 1, fresh + count + 1))
    if known is not None:
        named[known] = ids
    return ids, fresh + (1 if same else count)


def _pieces(text: str) -> list[dict[str, Any]]:
    """OpenPrompt's parse_text, with a literal reader in place of its eval."""
    pieces: list[dict[str, Any]] = []
    at = 0
    while at < len(text):
        start = at
        while at < len(text) and text[at] == " ":
            at += 1
        if at == len(text):
            break
        space = " " if at > start or (at > 0 and text[at - 1] == " ") else ""
        if text[at] != "{":
            end = text.find("{", at)
            end = len(text) if end < 0 else end
            # Spaces before a brace belong to the part that follows.
            pieces.append({"text": text[at:end].rstrip(" "), "space": space})
            at = end
            continue
        end = text.find("}", at)
        if end < 0:
            raise TemplateError(f"template {text!r} has no closing brace for the one at {at}")
        pieces.append({**_literal(text[at : end + 1]), "space": space})
        at = end + 1
    return pieces


def _literal(text: str) -> dict[str, Any]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise TemplateError(f"OpenPrompt's template part {text} is no plain literal, and no code is run") from error
    if isinstance(value, set):
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TemplateError(f"OpenPrompt's template part {text} is no set of named settings")
    return value


def _specials(base: BaseFacts | None) -> tuple[str, str]:
    """What the base's tokenizer puts around a text, as text."""
    if base is None or base.tokenizer is None:
        return "", ""
    tokenizer = base.tokenizer
    bare, full = (list(tokenizer.encode("a", add_special_tokens=special)) for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            around = full[:start], full[start + len(bare) :]
            before, after = (tokenizer.decode(ids, skip_special_tokens=False) if ids else "" for ids in around)
            return str(before), str(after)
    return "", ""
