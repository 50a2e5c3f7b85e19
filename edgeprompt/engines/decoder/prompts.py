"""A decoder's prompts: what stays at hand of each, and how a request on it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprompt.engines.decoder.graph import DecoderGraph
from edgeprompt.ort.kv_cache import KV
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.template import Template
from edgeprompt.prompts.verbalizer import Verbalizer

if TYPE_CHECKING:
    from edgeprompt.engines.decoder.engine import DecoderEngine

Rows = npt.NDArray[np.float32]


@dataclass(eq=False)
class Loaded:
    """A prompt as the engine keeps it: what requests need at hand; its tensors come from `source` when needed."""

    source: PromptSource
    template: Template
    verbalizer: Verbalizer | None
    count: int = 0
    """Virtual tokens, or prefix positions."""
    as_prefix: bool = True
    """Whether keys and values in front of the text carry the prompt; else virtual ids in the text do."""

    @property
    def prompt(self) -> PromptFile:
        """Everything but the tensors."""
        return self.source.prompt


@dataclass
class PromptStart:
    """How a request on a prompt begins (`scheduler.Start`)."""

    engine: DecoderEngine
    loaded: Loaded | None
    ids: Sequence[int]
    total: int
    whole: bool = True
    """False: the text is empty, so the prompt's last virtual token is run for its logits."""
    states: list[Rows] | None = None
    """Gets the hidden states behind `ids`; None: nobody asks for them."""

    def prefix(self, graph: DecoderGraph, slot: int, total: int) -> KV | None:
        """The prompt's keys and values."""
        if self.loaded is None or not self.loaded.count or not self.loaded.as_prefix:
            return None
        prefix = self.engine.prefix(self.loaded, graph, slot, total)
        return prefix if self.whole else prefix[:, :, :-1]

    def rows(self) -> Rows | None:
        """The prompt's rows, where ids stand for them."""
        if self.loaded is None or (self.loaded.as_prefix and self.whole):
            return None
        return self.engine.rows(self.loaded)
