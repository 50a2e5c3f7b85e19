"""What a decoder's tokens give besides logits: the states behind them, for heads and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.arrays import require_finite
from edgeprompt.decoding.strategies import OneSequence
from edgeprompt.engines.decoder.graph import DecoderGraph
from edgeprompt.errors import UnsupportedError
from edgeprompt.heads.answers import answer, classify_head, tag, token_logits
from edgeprompt.heads.layers import check_head
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.encoder_text import EncodedText
from edgeprompt.prompts.file import PromptFile
from edgeprompt.request import Answer, Classification, Clock, Tagging

Floats = npt.NDArray[np.float32]

_INPUTS = ("last", "tokens", "tokens_unshifted")


def check_head_of(name: str, prompt: PromptFile, manifest: Manifest, graph: DecoderGraph) -> None:
    """Refuse a head that a decoder does not serve, or that does not fit.

    Raises:
        UnsupportedError: it reads a pooled state, or the graph does not give what it reads.
        BaseMismatchError: it does not fit the hidden size.
        InputError: it does not fit the prompt's task or labels.
    """
    assert prompt.head_spec is not None
    source = prompt.head_spec.input
    if source not in _INPUTS:
        raise UnsupportedError(
            f"the head of prompt {name!r} reads {source!r}; decoder-only packages serve heads on the last token or on "
            "every token, and encoder packages the others"
        )
    check_states(graph, everywhere=source != "last")
    check_head(name, prompt, manifest)


def check_states(graph: DecoderGraph, *, everywhere: bool = False) -> None:
    """Refuse a graph that does not give hidden states, or `everywhere` only those of the last token.

    Raises:
        UnsupportedError: it does not.
    """
    if not (graph.gives_all_states if everywhere else graph.gives_states):
        which = "of every token" if everywhere else "of the last token"
        raise UnsupportedError(
            f"the graph has no output {names.HIDDEN_STATES} {which}, which heads and embeddings read; export the base "
            "again with this version of edgeprompt"
        )


class ReadState(OneSequence):
    """Hands out the state behind the last token."""

    def __init__(self, states: Sequence[Floats]) -> None:
        """`states` fills while the text is run: float32 [tokens, hidden_size] for every piece."""
        self.states = states

    def advance(self, logits: Floats) -> None:
        """Nothing follows the text."""

    def result(self) -> Any:
        """float32 [hidden_size]."""
        return require_finite(self.states[-1][-1])


class ClassifyState(ReadState):
    """Classifies by the prompt's head on the last token."""

    def __init__(self, states: Sequence[Floats], prompt: PromptFile, clock: Clock) -> None:
        super().__init__(states)
        self._prompt, self._clock = prompt, clock

    def result(self) -> Classification:
        """The decision."""
        found = classify_head(self._prompt, super().result())
        self._clock.tick()
        return replace(found, timings=self._clock.timings(1))


class LabelWords(ReadState):
    """Labels words, or looks for an answer, by the prompt's head on every token."""

    def __init__(
        self, states: Sequence[Floats], prompt: PromptFile, encoded: EncodedText, text: str, virtual_tokens: int
    ) -> None:
        """`virtual_tokens`: how many stand among the encoded ids, in front of `text`."""
        super().__init__(states)
        self._prompt, self._encoded, self._text, self._virtual = prompt, encoded, text, virtual_tokens

    def result(self) -> Tagging | Answer:
        """Spans."""
        logits = token_logits(self._prompt, np.concatenate(list(self.states)), self._virtual)
        if self._prompt.task == "tag":
            return tag(self._prompt, logits, self._encoded.offsets, self._text)
        no_answer = self._virtual if self._prompt.generation.get("allow_no_answer") else None
        return answer(logits, self._encoded.offsets, self._text, no_answer)
