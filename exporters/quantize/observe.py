"""What a base's matrices are fed over calibration texts: which columns of their inputs are large, and which matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import DataError
from exporters.validate.quality import Ids, calibration_texts, encode_texts

MOST_TOKENS = 2048
"""Tokens of one pass, padding included."""
MOST_PARAMETERS = 400_000_000
"""Of a base that is observed closely: what is kept takes about 2 kB a row and column of its matrices."""
KEPT_TOKENS, KEPT_AT_ONCE = 2048, 256
"""Tokens whose inputs are kept, in all and of one pass."""
VIRTUAL = 8
"""Rows of noise in place of a text's first tokens: what stands there in an untrained prompt."""
_EVERY = 4
"""One position of so many predicts a token: the output layer of a small base takes longer than all others."""

Piece = tuple[str, int, bool]


@dataclass
class Observed:
    """Statistics of inputs, for each parameter that is a matrix of a linear layer: a value for each of its columns."""

    largest: dict[str, torch.Tensor] = field(default_factory=dict)
    """Largest magnitude."""
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """bfloat16 [tokens, columns] of each pass, where the base was observed closely."""
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """As `inputs`, [tokens, rows]: of the log-likelihood of tokens that the base draws, by the matrix's product."""
    texts: list[torch.Tensor] = field(default_factory=list)
    """As `inputs`, [tokens]: which text of its pass a token is of."""
    predicted: int = 0
    """How many tokens were drawn."""

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Count inputs [tokens, columns]."""
        largest = rows.abs().amax(0)
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest

    def inputs_of(self, pieces: list[Piece]) -> torch.Tensor | None:
        """What the parameters that a weight consists of are fed, float32 [tokens, columns]; None where not kept."""
        if not pieces or any(name not in self.inputs for name, _, _ in pieces):
            return None
        return torch.cat(self.inputs[pieces[0][0]]).float()

    def gradients_of(self, pieces: list[Piece]) -> torch.Tensor:
        """Gradients by the product of a weight that `inputs_of` knows, float32 [tokens, rows]."""
        return torch.cat([torch.cat(self.gradients[name]).float() for name, _, _ in pieces], dim=1)

    def divergence(self, changes: torch.Tensor) -> float:
        """KL divergence, in nats for each token predicted, that changes of a product come to.

        Half the mean square of what they do to the log-likelihood: the Fisher information of the base's own
        distribution. What happens to a text's tokens adds up, as it does where a weight changes.

        Args:
            changes: Changes times gradients [tokens].
        """
        lengths = [int(length) for texts in self.texts for length in torch.bincount(texts)]
        moved = torch.stack([part.sum() for part in torch.split(changes, lengths)])
        return 0.5 * float(moved.square().sum()) / max(self.predicted, 1)


def observe(loaded: LoadedBase, data: Any = None, *, closely: bool = False, virtual: bool = False) -> Observed:
    """Run a decoder over calibration texts, each matrix read once for many of them.

    A base that cannot read text is fed random token ids.

    Args:
        loaded: The base; its matrices may lie in their files.
        data: The user's texts, as `exporters.validate.quality.read_texts` takes them; None: the shipped ones.
        closely: Keep inputs and gradients too, of the first `KEPT_TOKENS` tokens, and look at no more.
        virtual: Then let every second text start with `VIRTUAL` random rows, so that activations of prompts are seen.

    Raises:
        DataError: `data` holds no text that the base can read.
    """
    geometry = geometry_of(loaded.config)
    source, texts = calibration_texts(data)
    encoded = encode_texts(loaded.tokenizer, texts, geometry.max_positions, geometry.vocab_size)
    if not encoded and data is not None:
        raise DataError(f"{source!r} cannot be read by the base's tokenizer: no text has two tokens it knows")
    if not encoded:
        random = np.random.default_rng(1)
        encoded = [random.integers(0, geometry.vocab_size, 24, dtype=np.int64) for _ in range(16)]
    observed, kept = Observed(), 0
    random_tokens = torch.Generator().manual_seed(0)
    for batch in _batches(encoded, KEPT_AT_ONCE if closely else MOST_TOKENS):
        if closely and kept >= KEPT_TOKENS:
            break
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(batch):
            ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
        if closely:
            kept += int(mask.sum())
            observed.texts.append(mask.nonzero()[:, 0])
        with _watched(loaded.model, observed, mask.bool(), keep=closely):
            if closely:
                _draw(loaded.model, observed, ids, mask, random_tokens, VIRTUAL if virtual else 0)
            else:
                with torch.no_grad():
                    loaded.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return observed


def _draw(
    model: Any, observed: Observed, ids: torch.Tensor, mask: torch.Tensor, random: torch.Generator, virtual: int
) -> None:
    """Let a base draw next tokens, and go back from their log-likelihood to all of its matrices."""

    def some(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (given[0][mask.bool()][::_EVERY][None], *given[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(some)
    try:
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach()
            rows = embedded[1::2, :virtual]
            rows.copy_(torch.randn(rows.shape, generator=random) * embedded.std())
            embedded.requires_grad_(True)
            logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits[0]
            likely = torch.log_softmax(logits, -1)
            drawn = torch.multinomial(likely.detach().exp(), 1, generator=random)
            likely.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        hook.remove()
    observed.predicted += len(drawn)


def _batches(texts: list[Ids], most: int) -> Iterator[list[Ids]]:
    batch: list[Ids] = []
    for text in sorted(texts, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > most:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@contextmanager
def _watched(model: Any, observed: Observed, mask: torch.Tensor, *, keep: bool) -> Iterator[None]:
    """Count what linear layers are fed while this lasts, padding left out; `keep` inputs and gradients."""
    from transformers.pytorch_utils import Conv1D

    last: list[Any] = [None, None]  # queries, keys and values are fed one tensor, which is kept once

    def watch(name: str) -> Any:
        def keep_gradient(gradient: torch.Tensor) -> None:
            observed.gradients.setdefault(name, []).append(gradient[mask].bfloat16())

        def count(_: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            rows = given[0].detach()
            # Experts see some tokens of the batch, in an order of their own.
            whole = rows.shape[:2] == mask.shape
            observed.add(name, rows[mask] if whole else rows.flatten(0, -2))
            if not (keep and whole and out.requires_grad):
                return
            if last[0] is not given[0]:
                last[:] = given[0], rows[mask].bfloat16()
            observed.inputs.setdefault(name, []).append(last[1])
            out.register_hook(keep_gradient)  # type: ignore[no-untyped-call]

        return count

    head = model.get_output_embeddings()
    hooks = [
        module.register_forward_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def of_pieces(values: Mapping[str, torch.Tensor], pieces: list[Piece]) -> torch.Tensor | None:
    """The largest statistic of each column over the parameters that a weight consists of; None where one is unknown."""
    found = [values[name] for name, _, _ in pieces if name in values]
    if not pieces or len(found) < len(pieces):
        return None
    return torch.from_numpy(np.maximum.reduce([one.float().numpy() for one in found]))
