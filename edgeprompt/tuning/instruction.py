"""What a teacher reads: an instruction with a place for the text, solved examples, a chat template around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprompt.errors import InputError, TemplateError
from edgeprompt.prompts.hard_prompt import SHOT_SEPARATOR
from edgeprompt.prompts.template import Literal, Mask, Part, Slot, Template, VirtualTokens

SHOTS = "shots"
"""The slot that solved examples stand at; without it they stand before the paragraph of the text."""
_LONGEST_TAIL = 64
"""Most characters behind the text that the student's template keeps whole; of more it keeps the last line."""
_NAMED = 60


@dataclass(frozen=True)
class Instruction:
    """An instruction, ready to be filled.

    Attributes:
        template: what the teacher reads, with slots for the input.
        student: what the student reads by default: `{prompt}` in place of all that stands before the text.
        add_special_tokens: whether the tokenizer adds its own tokens (a chat template brings them itself).
    """

    template: Template
    student: Template
    add_special_tokens: bool = True

    @property
    def words(self) -> str:
        """All fixed text, in order."""
        return "".join(part.text for part in self.template.parts if isinstance(part, Literal))

    @property
    def before(self) -> str:
        """The fixed text in front of the input."""
        first = self.template.parts[0]
        return first.text if isinstance(first, Literal) else ""


def parse_instruction(text: str) -> Template:
    """The written form of an instruction, with `{text}` (or other columns' names) where the input stands.

    Raises:
        InputError: no place for the text, a stray brace, or a slot that a teacher does not have.
    """
    shown = text if len(text) <= _NAMED else text[: _NAMED - 3] + "..."
    if not text.strip():
        raise InputError("the instruction is empty; write what to do, and {text} where the input stands")
    try:
        template = Template.parse(text)
    except TemplateError as error:
        if "has no slot for the text" in str(error):
            raise InputError(f"the instruction {shown!r} has no {{text}}; write it where the input stands") from error
        reason = str(error).replace(f"template {text!r}", f"the instruction {shown!r}", 1)
        raise InputError(reason) from error
    for part in template.parts:
        if isinstance(part, (VirtualTokens, Mask)):
            name = "{mask}" if isinstance(part, Mask) else "{prompt}"
            raise InputError(f"the instruction {shown!r} holds {name}, which a teacher does not have; take it out")
    if not [name for name in template.slots if name != SHOTS]:
        raise InputError(f"the instruction {shown!r} has no {{text}}; write it where the input stands")
    if template.slots.count(SHOTS) > 1:
        raise InputError(f"the instruction {shown!r} holds {{shots}} twice; the examples stand in one place")
    return template


def question_of(template: Template) -> Template:
    """The part of an instruction that a solved example repeats: the paragraph, or the line, that the text stands in."""
    return Template(tuple(_divide(template)[1])).checked()


def solved_text(template: Template, examples: Sequence[tuple[Mapping[str, str], str]]) -> str:
    """Solved examples, each as the question with its answer behind it."""
    question = question_of(template)
    return "".join(
        "".join(part.text if isinstance(part, Literal) else fields[part.name] for part in question.parts)  # type: ignore[union-attr]
        + answer
        + SHOT_SEPARATOR
        for fields, answer in examples
    )


def with_shots(template: Template, shots: str) -> Template:
    """The instruction with the text of solved examples in its place.

    Raises:
        InputError: `{shots}` stands in the instruction, and there are none.
    """
    if SHOTS in template.slots:
        if not shots:
            raise InputError("the instruction holds {shots}, and there are none; give --shots-from and --shots")
        end = shots.removesuffix(SHOT_SEPARATOR)
        return _joined([Literal(end) if part == Slot(SHOTS) else part for part in template.parts])
    head, question = _divide(template)
    return _joined([*head, Literal(shots), *question]) if shots else template


def make_instruction(template: Template, chat: Callable[[str], str] | None, bos: str | None) -> Instruction:
    """The teacher's and the student's templates.

    Args:
        template: the instruction, examples included.
        chat: renders a user's message with the base's chat template; None leaves it out.
        bos: the token that the tokenizer puts in front of a text; None where it puts none.
    """
    parts = template.parts
    first = next(place for place, part in enumerate(parts) if isinstance(part, Slot))
    last = max(place for place, part in enumerate(parts) if isinstance(part, Slot))
    tail = parts[last + 1].text if last + 1 < len(parts) else ""  # type: ignore[union-attr]
    if len(tail) > _LONGEST_TAIL:
        tail = "\n" + tail.rstrip().rpartition("\n")[2] + tail[len(tail.rstrip()) :]
    student: list[Part] = [VirtualTokens(), *parts[first : last + 1], Literal(tail)]
    if chat is None:
        return Instruction(template, _joined(student))
    marks = {part.name: f"<<{place}:{part.name}>>" for place, part in enumerate(parts) if isinstance(part, Slot)}
    rendered = chat("".join(part.text if isinstance(part, Literal) else marks[part.name] for part in parts))  # type: ignore[union-attr]
    after = chat("<<message>>").partition("<<message>>")[2]
    student = [VirtualTokens(), *parts[first : last + 1], Literal(tail.rstrip() + after)]
    special = not (bos and rendered.startswith(bos))
    return Instruction(_joined(_split(rendered, marks)), _joined(student), special)


def _divide(template: Template) -> tuple[list[Part], list[Part]]:
    """What stands before the question, and the question."""
    parts = list(template.parts)
    first = next(place for place, part in enumerate(parts) if isinstance(part, Slot) and part.name != SHOTS)
    before = parts[first - 1] if first else None
    if not isinstance(before, Literal):
        return parts[:first], parts[first:]
    text = before.text
    place = text.rfind(SHOT_SEPARATOR)
    cut = place + len(SHOT_SEPARATOR) if place >= 0 else text.rfind("\n") + 1
    return [*parts[: first - 1], Literal(text[:cut])], [Literal(text[cut:]), *parts[first:]]


def _split(text: str, marks: Mapping[str, str]) -> list[Part]:
    parts: list[Part] = []
    while text:
        found = [(text.find(mark), name) for name, mark in marks.items() if mark in text]
        if not found:
            return [*parts, Literal(text)]
        place, name = min(found)
        parts += [Literal(text[:place]), Slot(name)]
        text = text[place + len(marks[name]) :]
    return parts


def _joined(parts: Sequence[Any]) -> Template:
    """A template of parts in which literals that stand together are one, and empty ones are gone."""
    made: list[Part] = []
    for part in parts:
        if isinstance(part, Literal):
            if not part.text:
                continue
            if made and isinstance(made[-1], Literal):
                made[-1] = Literal(made[-1].text + part.text)
                continue
        made.append(part)
    return Template(tuple(made)).checked()
