"""Templates: where the virtual tokens and the text stand.

A template is written `"{prompt}{text}\\nSentiment:"`. `{prompt}` stands for all virtual tokens that no other slot
takes, `{prompt:4}` for the next four; every other name in braces is a slot that the request fills (`{text}`; for
pairs `{question}{context}`); `{mask}` is the mask token; `{{` and `}}` are literal braces.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from edgeprompt.errors import InputError, TemplateError
from edgeprompt.package.strict_json import check_type
from edgeprompt.package.tokenizer import UnreadableTextError, naming


@dataclass(frozen=True)
class Literal:
    """Fixed text."""

    text: str


@dataclass(frozen=True)
class Slot:
    """A field of the request."""

    name: str = "text"


@dataclass(frozen=True)
class VirtualTokens:
    """The next `count` virtual tokens; None: all that no other slot takes."""

    count: int | None = None


@dataclass(frozen=True)
class Mask:
    """The tokenizer's mask token (cloze verbalizers)."""


Part: TypeAlias = Literal | Slot | VirtualTokens | Mask

_FIELD = re.compile(r"\{\{|\}\}|\{([a-z_][a-z0-9_]*)(?::(\d+))?\}|[{}]")


class Tokenizer(Protocol):
    """What a template needs of a tokenizer."""

    @property
    def mask_token(self) -> str | None:
        """The mask token's text, None where there is none."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""

    def truncate(self, text: str, count: int) -> str:
        """The longest prefix of `text` of at most `count` tokens."""


@dataclass(frozen=True)
class Template:
    """An ordered list of parts."""

    parts: tuple[Part, ...]
    render: Callable[[str], str] | None = None
    """What the filled-in text goes through before it is tokenised (a chat template); never stored."""

    @staticmethod
    def parse(text: str) -> Template:
        """Read the written form.

        Raises:
            TemplateError: a stray brace, or two slots that both take the remaining virtual tokens.
        """
        parts: list[Part] = []
        literal, position = "", 0
        for match in _FIELD.finditer(text):
            literal += text[position : match.start()]
            position = match.end()
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
                continue
            if match[1] is None:
                raise TemplateError(f"template {text!r} {_what_is_wrong(text, match.start())}")
            if literal:
                parts.append(Literal(literal))
                literal = ""
            if match[2] is not None and match[1] != "prompt":
                raise TemplateError(f"template {text!r}: only {{prompt:N}} takes a number, found {match[0]}")
            if match[1] == "prompt":
                parts.append(VirtualTokens(int(match[2]) if match[2] is not None else None))
            else:
                parts.append(Mask() if match[1] == "mask" else Slot(match[1]))
        literal += text[position:]
        if literal:
            parts.append(Literal(literal))
        return Template(tuple(parts)).checked()

    @staticmethod
    def from_json(data: object) -> Template:
        """Read the form stored in prompt files (a list of one-key objects).

        Raises:
            TemplateError: not that form.
        """
        parts: list[Part] = []
        try:
            for item in check_type(data, list, "template"):
                ((key, value),) = check_type(item, dict, "template part").items()
                if key == "literal":
                    parts.append(Literal(check_type(value, str, "literal")))
                elif key == "slot":
                    parts.append(Slot(check_type(value, str, "slot")))
                elif key == "virtual_tokens":
                    parts.append(VirtualTokens(check_type(value, (int, type(None)), "virtual_tokens")))
                elif key == "mask":
                    parts.append(Mask())
                else:
                    raise ValueError(f"unknown template part {key!r}")
        except ValueError as error:
            raise TemplateError(f"bad template: {error}") from error
        return Template(tuple(parts)).checked()

    def to_json(self) -> list[dict[str, Any]]:
        """The form stored in prompt files."""
        written: list[dict[str, Any]] = []
        for part in self.parts:
            match part:
                case Literal(text):
                    written.append({"literal": text})
                case Slot(name):
                    written.append({"slot": name})
                case VirtualTokens(count):
                    written.append({"virtual_tokens": count})
                case Mask():
                    written.append({"mask": True})
        return written

    def checked(self) -> Template:
        """Return self.

        Raises:
            TemplateError: no slot, a negative count, or more than one open `{prompt}`.
        """
        if not self.slots:
            raise TemplateError(f"template {str(self)!r} has no slot for the text; write {{text}} where it belongs")
        counts = [part.count for part in self.parts if isinstance(part, VirtualTokens)]
        if counts.count(None) > 1:
            raise TemplateError(
                f"template {str(self)!r} has {{prompt}} twice; give all but one a count, as {{prompt:4}}"
            )
        if any(count is not None and count < 1 for count in counts):
            raise TemplateError(f"template {str(self)!r}: {{prompt:N}} needs N of at least 1")
        return self

    def __str__(self) -> str:
        """The written form."""
        text = ""
        for part in self.parts:
            match part:
                case Literal(literal):
                    text += literal.replace("{", "{{").replace("}", "}}")
                case Slot(name):
                    text += f"{{{name}}}"
                case VirtualTokens(count):
                    text += "{prompt}" if count is None else f"{{prompt:{count}}}"
                case Mask():
                    text += "{mask}"
        return text

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the request's fields, in order."""
        return tuple(part.name for part in self.parts if isinstance(part, Slot))

    @property
    def prompt_is_prefix(self) -> bool:
        """Whether all virtual tokens stand in front, so that their keys and values can be cached."""
        return not any(isinstance(part, VirtualTokens) for part in self.parts[1:])

    def without_prompt(self) -> Template:
        """The same template with no virtual tokens (the hard prompt, and prefix methods)."""
        return Template(tuple(part for part in self.parts if not isinstance(part, VirtualTokens)))

    def encode(
        self,
        tokenizer: Tokenizer,
        fields: Mapping[str, str],
        *,
        num_virtual_tokens: int,
        first_virtual_id: int,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of one request; virtual tokens are `first_virtual_id ...`.

        Text between virtual tokens is tokenised in one piece, exactly as PEFT users tokenise it. Special tokens (BOS;
        [CLS] ... [SEP]) go behind a leading prompt and around everything else, as PEFT does. Where the result would
        exceed `max_length`, the last slot is cut and fixed parts are kept.

        Args:
            tokenizer: anything with `encode`, `truncate` and `mask_token`.
            fields: slot name -> text.
            num_virtual_tokens: how many virtual tokens the prompt has; 0 for none.
            first_virtual_id: id of the first virtual token (`vocab_size` plus the prompt's first row in the bank).
            max_length: most ids allowed, virtual tokens included.
            add_special_tokens: whether the tokenizer adds its own.

        Raises:
            InputError: a field is missing, or the fixed parts alone exceed `max_length`.
            TemplateError: the counts do not add up to `num_virtual_tokens`.
        """
        missing = [name for name in self.slots if name not in fields]
        if missing:
            raise InputError(
                f"the template {str(self)!r} needs {missing[0]!r}; given: {', '.join(map(str, fields)) or 'nothing'}"
            )
        with self.naming_parts(tokenizer, fields):
            ids = self._encode(tokenizer, fields, num_virtual_tokens, first_virtual_id, add_special_tokens)
        if max_length is None or len(ids) <= max_length:
            return ids
        name, over = self.slots[-1], len(ids) - max_length
        text = fields[name]
        tokens = len(tokenizer.encode(text, add_special_tokens=False))

        def cut(count: int) -> list[int]:
            shorter = {**fields, name: tokenizer.truncate(text, count)}
            return self._encode(tokenizer, shorter, num_virtual_tokens, first_virtual_id, add_special_tokens)

        if self.render is not None:  # it may repeat or trim the text, so the longest that fits is searched for
            over = tokens - bisect_right(range(1, tokens + 1), max_length, key=lambda count: len(cut(count)))
        while tokens > 0:
            tokens = max(0, tokens - over)
            ids = cut(tokens)
            over = len(ids) - max_length
            if over <= 0:
                return ids
        raise InputError(f"the template's fixed parts and prompt take {len(ids)} tokens; at most {max_length} fit")

    def _encode(
        self, tokenizer: Tokenizer, fields: Mapping[str, str], num_virtual_tokens: int, first_id: int, special: bool
    ) -> list[int]:
        counts = self._counts(num_virtual_tokens)
        runs: list[list[int] | str] = []
        next_id = first_id
        for part in self.parts:
            if isinstance(part, VirtualTokens):
                count = next(counts)
                runs.append(list(range(next_id, next_id + count)))
                next_id += count
                continue
            text = fields[part.name] if isinstance(part, Slot) else part.text if isinstance(part, Literal) else None
            if text is None:
                if tokenizer.mask_token is None:
                    raise TemplateError("the template has {mask}, and this tokenizer has no mask token")
                text = tokenizer.mask_token
            if runs and isinstance(runs[-1], str):
                runs[-1] += text
            else:
                runs.append(text)
        if self.render is not None:
            runs = [self.render(run) if isinstance(run, str) else run for run in runs]
        texts = [run for run in runs if isinstance(run, str)]
        if len(texts) == 1 and (isinstance(runs[0], str) or len(runs) == 2) and isinstance(runs[-1], str):
            lead = runs[0] if isinstance(runs[0], list) else []
            return [*lead, *tokenizer.encode(texts[0], add_special_tokens=special)]
        before, after = _specials(tokenizer) if special else ([], [])
        ids: list[int] = []
        started = False
        for run in runs:
            if isinstance(run, list) and not started and not ids:
                ids += run
                continue
            if not started:
                ids += before
                started = True
            ids += run if isinstance(run, list) else tokenizer.encode(run, add_special_tokens=False)
        return ids + after

    @contextmanager
    def naming_parts(self, tokenizer: Tokenizer, fields: Mapping[str, str]) -> Iterator[None]:
        """While inside, an error about a text that cannot be encoded names the part of the template that has it."""
        try:
            yield
        except UnreadableTextError:
            for part in self.parts:
                if isinstance(part, Literal):
                    try:
                        tokenizer.encode(part.text, add_special_tokens=False)
                    except UnreadableTextError as error:
                        raise TemplateError(f"{part.text!r} of template {str(self)!r} {error.reason}") from error
            for name in self.slots if len(self.slots) > 1 else ():
                with naming(f"{{{name}}}"):
                    tokenizer.encode(fields[name], add_special_tokens=False)
            raise

    def check_places(self, num_virtual_tokens: int) -> None:
        """Refuse a template whose slots hold fewer or more virtual tokens than a prompt has.

        Raises:
            TemplateError: names both numbers.
        """
        self._counts(num_virtual_tokens)

    def _counts(self, num_virtual_tokens: int) -> Any:
        slots = [part.count for part in self.parts if isinstance(part, VirtualTokens)]
        if not slots or num_virtual_tokens == 0:
            return iter([0] * len(slots))
        fixed = sum(count for count in slots if count is not None)
        rest = num_virtual_tokens - fixed
        if rest < 0 or (rest > 0 and None not in slots):
            raise TemplateError(
                f"template {str(self)!r} places {fixed} virtual tokens, and the prompt has {num_virtual_tokens}"
            )
        return iter([rest if count is None else count for count in slots])


def _what_is_wrong(text: str, place: int) -> str:
    """About the brace at `place`, which begins or ends no slot."""
    brace = text[place]
    found = re.match(r"\{([^{}\n]*)\}", text[place:])
    if found is None:
        return f"has a stray {brace!r} at {place}; write {brace * 2}"
    slot, name = found[0], found[1].partition(":")[0]
    rule = (
        f"has {slot!r} at {place}, which is no slot: a name has small letters, digits and _, and begins with no digit"
    )
    if name.strip() == "prompt":
        return f"has {slot!r} at {place}; write {{prompt}}, or {{prompt:4}} for the next four virtual tokens"
    better = re.sub(r"[^a-z0-9_]+", "_", name.strip().lower()).strip("_")
    better = f"_{better}" if better[:1].isdigit() else better or "text"
    return f"{rule}; write {{{better}}}, or {{{slot}}} for braces that stand in the text"


def _specials(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def as_fields(text: str | Mapping[str, str]) -> Mapping[str, str]:
    """A request's text as slot fields: a plain string fills `{text}`.

    Raises:
        InputError: neither a string nor a mapping of strings.
    """
    if isinstance(text, str):
        return {"text": text}
    if not isinstance(text, Mapping):
        raise InputError(f"the text is {type(text).__name__}; give a string, or a mapping of slot names to strings")
    for name, value in text.items():
        if not isinstance(value, str):
            raise InputError(f"the text of {name!r} is {type(value).__name__}; it must be a string")
    return text


def label_words(verbalizer: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(label, word) pairs in order."""
    return [(label, word) for label, words in verbalizer.items() for word in words]
