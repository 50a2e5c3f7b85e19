"""What a decoder in PyTorch says of many texts, its weights read once for all of them.

A base whose weights lie in their files (`edgeprompt.base.mapped`) takes seconds to read once; a pass for each text and
step would take it hundreds of times. Texts are padded on the right, behind what causal attention looks at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeprompt.base.decoder_graph import embed

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

MOST_TOKENS = 4096
"""Tokens of one pass, padding included."""


@dataclass(frozen=True)
class Question:
    """Token ids, virtual ones included, and the positions whose next token is asked for."""

    ids: Ids
    positions: Sequence[int]
    rows: Floats | None = None
    """What virtual ids index."""


@dataclass(frozen=True)
class Said:
    """What the base says: one row for each position."""

    logits: Floats
    states: Floats
    """What the output layer reads, [positions, hidden_size]."""


def ask(model: Any, questions: Sequence[Question], vocab_size: int, past: Any = None) -> list[Said]:
    """Answer all questions.

    Args:
        model: The base in PyTorch.
        questions: Any number; those of similar length share a pass.
        vocab_size: The first virtual id.
        past: float32 [num_layers, 2, num_key_value_heads, positions, head_size] in front of every question.
    """
    answers: dict[int, Said] = {}
    for batch in _batches(questions):
        answers |= zip(batch, _pass(model, [questions[at] for at in batch], vocab_size, past), strict=True)
    return [answers[index] for index in range(len(questions))]


def _batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(range(len(questions)), key=lambda at: -len(questions[at].ids)):
        if batch and (len(batch) + 1) * len(questions[batch[0]].ids) > MOST_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pass(model: Any, questions: Sequence[Question], vocab_size: int, past: Any) -> list[Said]:
    from transformers import DynamicCache

    longest, before = max(len(one.ids) for one in questions), 0 if past is None else past.shape[3]
    embedded, mask = [], torch.zeros(len(questions), before + longest, dtype=torch.int64)
    for row, one in enumerate(questions):
        found = embed(model, one.ids, one.rows, vocab_size)[0]
        embedded.append(torch.nn.functional.pad(found, (0, 0, 0, longest - len(one.ids))))
        mask[row, : before + len(one.ids)] = 1
    cache = None
    if past is not None:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(torch.from_numpy(np.asarray(past, np.float32))):
            cache.update(*(part[None].repeat(len(questions), 1, 1, 1) for part in (key, value)), layer)
    rows = torch.tensor([row for row, one in enumerate(questions) for _ in one.positions])
    places = torch.tensor([place for one in questions for place in one.positions])
    states: list[torch.Tensor] = []

    def take(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states.append(given[0][rows, places])
        return (states[0][None], *given[1:])

    alone = len(questions) == 1 and past is None
    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        with torch.no_grad():
            output = model(
                inputs_embeds=torch.stack(embedded),
                attention_mask=None if alone else mask,
                past_key_values=cache,
                use_cache=cache is not None,
            )
    finally:
        hook.remove()
    logits = output.logits[0, :, : model.config.get_text_config().vocab_size].float().numpy()
    counts = np.cumsum([len(one.positions) for one in questions])[:-1]
    parts = zip(np.split(logits, counts), np.split(states[0].float().numpy(), counts), strict=True)
    return [Said(*pair) for pair in parts]
