"""What a decoder's tokens give besides logits: the states behind them, for heads and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.decoding.strategies import Clock
from edgeprompt.engines.decoder.graph import DecoderGraph
from edgeprompt.engines.decoder.prompts import Loaded
from edgeprompt.engines.encoder.checks import GraphFacts, check_head
from edgeprompt.errors import UnsupportedError
from edgeprompt.heads.answers import answer, classify_head, tag, token_logits
from edgeprompt.package.manifest import Manifest
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.encoder_text import EncodedText, encode_text, fields_of, located_slot
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.template import as_fields
from edgeprompt.request import Answer, Classification, Request, Tagging

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
    check_head(name, prompt, GraphFacts(manifest, (), (names.LOGITS, names.HIDDEN_STATES)))


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


def encode_words(
    request: Request, loaded: Loaded, tokenizer: Tokenizer, *, first_virtual_id: int, limit: int
) -> EncodedText:
    """A request whose words are labelled or searched: ids behind the prefix, and where each token stands.

    Raises:
        InputError: it has ids instead of a text, or is too long.
        TemplateError: virtual tokens stand inside the text.
    """
    prompt = loaded.prompt
    return encode_text(
        prompt.template,
        tokenizer,
        fields_of(request),
        num_virtual_tokens=0 if loaded.as_prefix else loaded.count,
        first_virtual_id=first_virtual_id,
        max_length=limit - (loaded.count if loaded.as_prefix else 0) if limit else None,
        truncate=request.truncate,
        add_special_tokens=prompt.add_special_tokens,
        locate=located_slot(prompt.template),
    )


class StateWork:
    """Hands out the state behind the last token."""

    def __init__(self, states: Sequence[Floats]) -> None:
        """`states` fills while the text is run: float32 [tokens, hidden_size] for every piece."""
        self.length = 0
        self.states = states

    def advance(self, logits: Floats) -> None:
        """Nothing follows the text."""

    def result(self) -> Any:
        """float32 [hidden_size]."""
        return self.states[-1][-1]


class ClassWork(StateWork):
    """Classifies by the prompt's head on the last token."""

    def __init__(self, states: Sequence[Floats], prompt: PromptFile, clock: Clock) -> None:
        super().__init__(states)
        self._prompt, self._clock = prompt, clock

    def result(self) -> Classification:
        """The decision."""
        found = classify_head(self._prompt, super().result())
        self._clock.tick()
        return replace(found, timings=self._clock.timings(1))


class WordWork(StateWork):
    """Labels words, or looks for an answer, by the prompt's head on every token."""

    def __init__(self, states: Sequence[Floats], loaded: Loaded, encoded: EncodedText, request: Request) -> None:
        super().__init__(states)
        self._prompt, self._encoded = loaded.prompt, encoded
        self._text = as_fields(request.text)[located_slot(loaded.template)]
        self._virtual = 0 if loaded.as_prefix else loaded.count

    def result(self) -> Tagging | Answer:
        """Spans."""
        logits = token_logits(self._prompt, np.concatenate(list(self.states)), self._virtual)
        if self._prompt.task == "tag":
            return tag(self._prompt, logits, self._encoded.offsets, self._text)
        no_answer = self._virtual if self._prompt.generation.get("allow_no_answer") else None
        return answer(logits, self._encoded.offsets, self._text, no_answer)
