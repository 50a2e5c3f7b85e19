"""What all frozen bases with a soft prompt share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgeprompt.tuning.soft_prompt import SoftPrompt


class Prompted(nn.Module):
    """A frozen base with a soft prompt in front of or inside its texts."""

    def __init__(self, base: Any, soft: SoftPrompt | None, *, vocab_size: int) -> None:
        """`base`: a transformers model; `soft`: None trains a head alone."""
        super().__init__()
        self.base = base
        self.soft: Any = soft
        self.vocab_size = vocab_size

    def train(self, mode: bool = True) -> Prompted:
        """As `nn.Module.train`, but the frozen base stays in evaluation mode: no dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def shared(self) -> Any:
        """What many batches can share while the prompt stands still."""
        raise NotImplementedError

    def start_prefix(self, ids: Sequence[int]) -> torch.Tensor | None:
        """Keys and values of a text to start a prefix from, as `SoftPrompt` gives them; None: there is no such text."""
        raise NotImplementedError

    def embed(self, ids: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of `ids` [batch_size, sequence_length]; virtual ids take rows of `prompt`."""
        ids = ids.to(self.base.device)
        virtual = ids >= self.vocab_size
        embedded: torch.Tensor = self.base.get_input_embeddings()(ids.masked_fill(virtual, 0))
        if prompt is None or not bool(virtual.any()):
            return embedded
        rows = prompt.to(embedded.dtype)[(ids - self.vocab_size).clamp(min=0)]
        return torch.where(virtual[..., None], rows, embedded)


class PromptedLM(Prompted):
    """A base that predicts tokens. Its output layer sees only the positions that are asked for."""

    def __init__(self, base: Any, soft: SoftPrompt | None, *, vocab_size: int) -> None:
        super().__init__(base, soft, vocab_size=vocab_size)
        self._wanted: tuple[torch.Tensor, torch.Tensor] | None = None
        base.get_output_embeddings().register_forward_pre_hook(self._gather)

    def logits(
        self, texts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], shared: Any = None
    ) -> torch.Tensor:
        """Logits [count, vocab_size] of every token of every answer, and of the token behind it.

        Args:
            texts: token ids, those of virtual tokens at or above `vocab_size`.
            answers: for each text the token ids of one or more answers, without their last token.
            shared: `self.shared()`, where many batches share it; None computes it.

        Returns:
            For each text, for each of its answers: `len(answer) + 1` rows.
        """
        raise NotImplementedError

    def begin(self, texts: Sequence[Sequence[int]], shared: Any = None) -> tuple[torch.Tensor, list[Any]]:
        """Compute texts once, for any number of answers: logits [len(texts), vocab_size], and a state for each text."""
        raise NotImplementedError

    def go_on(self, state: Any, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [count, vocab_size] behind every token of every answer to the text of `state` (see `begin`)."""
        raise NotImplementedError

    def open(self, texts: Sequence[Sequence[int]], shared: Any = None) -> tuple[torch.Tensor, Any]:
        """Begin an answer to each of some texts of equal length: logits [len(texts), vocab_size], and a state."""
        raise NotImplementedError

    def step(self, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [len(texts), vocab_size] behind one more token [len(texts)] of every answer; the state goes along."""
        raise NotImplementedError

    def bytes_of(self, text: int, answer: int) -> int:
        """About how many bytes an answer's row holds until its gradients are there, from two numbers of tokens.

        Keys and values of all positions, as every layer's attention copies them, and float32 logits as the loss does.
        """
        config = self.base.config
        layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
        layers = int(layers or config.num_hidden_layers)
        return 4 * (4 * layers * int(config.hidden_size) * (text + answer) + 3 * self.vocab_size * answer)

    @contextmanager
    def gathering(self, places: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Give the output layer only the hidden states at `places` (row, position), as [len(places), hidden_size]."""
        wanted = torch.tensor(places, device=self.base.device).T
        self._wanted = (wanted[0], wanted[1])
        try:
            yield
        finally:
            self._wanted = None

    def _gather(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (inputs[0][self._wanted], *inputs[1:]) if self._wanted is not None else None


def pad_right(rows: Sequence[Sequence[int]], before: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batch_size, longest] and mask [batch_size, before + longest], `before` positions in front being real."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), before + length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[index, : before + len(row)] = 1
    return ids, mask
