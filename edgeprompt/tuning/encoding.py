"""Records of data to token ids, through the template and exactly as the runtime does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from edgeprompt import names
from edgeprompt.errors import DataError
from edgeprompt.evaluation.cells import text_of
from edgeprompt.evaluation.formats import Record
from edgeprompt.package.tokenizer import Tokenizer, UnreadableTextError
from edgeprompt.prompts.encoder_text import EncodedText, encode_text, pair_slots
from edgeprompt.prompts.template import Mask, Template
from edgeprompt.tuning.options import TuneOptions


@dataclass(frozen=True)
class RecordEncoder:
    """Encodes records for one prompt on one base."""

    architecture: str
    template: Template
    tokenizer: Tokenizer
    options: TuneOptions
    num_virtual_ids: int
    """Virtual ids that a record carries: 0 for a prefix and for a head alone."""
    prefix_length: int
    """Positions that a prefix takes of the longest length."""
    vocab_size: int
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own tokens; a chat template brings them itself."""

    def fields(self, record: Record, where: str) -> dict[str, str]:
        """The template's slots from the columns of the same name; `{text}` is the text column."""
        columns = {slot: self.options.text_column if slot == "text" else slot for slot in self.template.slots}
        return {slot: text_of(record, column, where) for slot, column in columns.items()}

    def encode(self, fields: Mapping[str, str], *, room: int = 0, locate: bool = False, where: str = "") -> EncodedText:
        """Token ids with `room` left of the longest length; `locate`: with the characters that tokens cover.

        Raises:
            DataError: the text holds the mask token that a template's `{mask}` stands for, or a token that the base
                has no embedding of: `run` refuses both. `where` says which text.
            TemplateError: the template has such a token.
        """
        try:
            encoded = self._encoded(fields, room, locate)
        except UnreadableTextError as error:
            raise DataError(f"{where}: {error}" if where else str(error)) from error
        self._check(encoded.ids, where or "the text")
        return encoded

    def _check(self, ids: Sequence[int], where: str) -> None:
        foreign = sum(token >= self.vocab_size for token in ids) != self.num_virtual_ids
        if foreign:
            raise DataError(f"{where} holds a special token that the base has no embedding of; remove it from the text")
        wanted = sum(isinstance(part, Mask) for part in self.template.parts)
        if wanted and self._mask is not None and list(ids).count(self._mask) != wanted:
            mask = self.tokenizer.mask_token
            raise DataError(f"{where} holds {mask!r}, the token that the template's {{mask}} stands for; remove it")

    @cached_property
    def _mask(self) -> int | None:
        return None if self.tokenizer.mask_token is None else self.tokenizer.token_to_id(self.tokenizer.mask_token)

    def _encoded(self, fields: Mapping[str, str], room: int, locate: bool) -> EncodedText:
        longest = self.options.max_length - self.prefix_length - room
        if self.architecture == names.ENCODER_ONLY:
            return encode_text(
                self.template,
                self.tokenizer,
                fields,
                num_virtual_tokens=self.num_virtual_ids,
                first_virtual_id=self.vocab_size,
                max_length=longest,
                truncate=True,
                locate=self.located if locate else None,
            )
        ids = self.template.encode(
            self.tokenizer,
            fields,
            num_virtual_tokens=self.num_virtual_ids,
            first_virtual_id=self.vocab_size,
            max_length=longest,
            add_special_tokens=self.add_special_tokens,
        )
        return EncodedText(ids, [], [])

    @property
    def located(self) -> str:
        """The slot that tags or answers stand in: the second of a pair, `context` or `text`, else the last."""
        if pair := pair_slots(self.template):
            return pair[1]
        slots = self.template.slots
        return next((name for name in ("context", "text") if name in slots), slots[-1])
