"""Rows of data to token ids, through the template and exactly as the runtime does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprompt import names
from edgeprompt.evaluation.data import Row, text_of
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.encoder_text import EncodedText, encode_text, pair_slots
from edgeprompt.prompts.template import Template
from edgeprompt.tuning.options import TuneOptions


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows for one prompt on one base."""

    architecture: str
    template: Template
    tokenizer: Tokenizer
    options: TuneOptions
    num_virtual_ids: int
    """Virtual ids that a row carries: 0 for a prefix and for a head alone."""
    prefix_length: int
    """Positions that a prefix takes of the longest length."""
    vocab_size: int

    def fields(self, row: Row, where: str) -> dict[str, str]:
        """The template's slots from the columns of the same name; `{text}` is the text column."""
        columns = {slot: self.options.text_column if slot == "text" else slot for slot in self.template.slots}
        return {slot: text_of(row, column, where) for slot, column in columns.items()}

    def encode(self, fields: Mapping[str, str], *, room: int = 0, locate: bool = False) -> EncodedText:
        """Token ids with `room` left of the longest length; `locate`: with the characters that tokens cover."""
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
        )
        return EncodedText(ids, [], [])

    @property
    def located(self) -> str:
        """The slot that tags or answers stand in: the second of a pair, `context` or `text`, else the last."""
        if pair := pair_slots(self.template):
            return pair[1]
        slots = self.template.slots
        return next((name for name in ("context", "text") if name in slots), slots[-1])
