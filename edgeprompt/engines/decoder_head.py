"""What a decoder's last token gives besides logits: the state behind them, for heads and embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.engines.decoder_graph import DecoderGraph
from edgeprompt.engines.encoder_checks import GraphFacts, check_head
from edgeprompt.engines.encoder_tasks import classify_head
from edgeprompt.errors import UnsupportedError
from edgeprompt.manifest import Manifest
from edgeprompt.prompt_file import PromptFile
from edgeprompt.request import Classification
from edgeprompt.work import Clock

Floats = npt.NDArray[np.float32]


def check_last_head(name: str, prompt: PromptFile, manifest: Manifest, graph: DecoderGraph) -> None:
    """Refuse a head that a decoder does not serve, or that does not fit.

    Raises:
        UnsupportedError: it reads other states than the last token's, or the graph does not give them.
        BaseMismatchError: it does not fit the hidden size.
        InputError: it does not fit the prompt's task or labels.
    """
    assert prompt.head_spec is not None
    if prompt.head_spec.input != "last":
        raise UnsupportedError(
            f"the head of prompt {name!r} reads {prompt.head_spec.input!r}; decoder-only packages serve heads on the "
            "last token, and encoder packages the others"
        )
    check_states(graph)
    check_head(name, prompt, GraphFacts(manifest, (), (names.LOGITS, names.HIDDEN_STATES)))


def check_states(graph: DecoderGraph) -> None:
    """Refuse a graph that does not give hidden states.

    Raises:
        UnsupportedError: it does not.
    """
    if not graph.gives_states:
        raise UnsupportedError(
            f"the graph has no output {names.HIDDEN_STATES}, which heads and embeddings read; export the base again "
            "with this version of edgeprompt"
        )


class StateWork:
    """Hands out the state behind the last token; the scheduler's thread asks right behind the prefill."""

    def __init__(self, graph: DecoderGraph) -> None:
        self.length = 0
        self._graph = graph
        self._state: Floats | None = None

    def advance(self, logits: Floats) -> None:
        """Keep the state; prefills give new arrays."""
        self._state = self._graph.states

    def result(self) -> Any:
        """float32 [hidden_size]."""
        assert self._state is not None
        return self._state


class HeadWork(StateWork):
    """Classifies by the prompt's head."""

    def __init__(self, graph: DecoderGraph, prompt: PromptFile, clock: Clock) -> None:
        super().__init__(graph)
        self._prompt, self._clock = prompt, clock

    def result(self) -> Classification:
        """The decision."""
        found = classify_head(self._prompt, super().result())
        self._clock.tick()
        return replace(found, timings=self._clock.timings(1))
