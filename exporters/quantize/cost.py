"""What 8-bit integers cost linear layers that share an input, in nats, and the factors of its columns that cost least.

A base's gradients say how much a change of an input, or of a weight, moves its distribution
(`exporters.quantize.observe.Observed.divergence`). Rounding to steps is such a change: its mean square is a twelfth of
the step's, or all of a value that is smaller than that. So the cost is a formula of the factors, and descent finds
those that cost least, for activations and weights together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LEVELS = 127
"""Of activations."""
LEAST_TOKENS = 256
"""Fewer than these do not tell which columns are large in other texts."""
_UNEVEN = math.sqrt(12)
"""Steps over the root of the mean square of what rounding to them changes."""
_TRIED = (0.35, 0.5, 0.65)
"""Shares of outliers that go to weights, where descent may start."""
_DESCENTS, _RATE, _SLOWEST = 50, 0.3, 0.05
_OFFSETS = 8
"""A factor of all columns changes nothing, but it decides how exponents are rounded: so many are tried."""
_MOST_TOKENS = 1024
"""That descent looks at."""


class Cost:
    """Of one input and its readers."""

    def __init__(
        self,
        inputs: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        *,
        predicted: int,
        levels: int,
    ) -> None:
        """Take statistics.

        Args:
            inputs: float32 [tokens, columns].
            gradients: Of the log-likelihood by each reader's product, [tokens, rows].
            weights: Of each reader, [rows, columns].
            predicted: How many tokens the log-likelihood is of.
            levels: Largest magnitude of the integers that weights become.
        """
        share = 0.5 / max(predicted, 1)
        every = -(-len(inputs) // _MOST_TOKENS)
        by_input = sum(gradient @ weight for gradient, weight in zip(gradients, weights, strict=True))
        assert isinstance(by_input, torch.Tensor)
        self._inputs = inputs[::every].abs()
        self._moved = by_input[::every].square_().mul_(share * every)
        self._weights = [weight.abs() for weight in weights]
        self._rows, self._columns = [], []
        for gradient in gradients:
            squares = gradient.square()
            of_token = squares.sum(1, keepdim=True)
            self._rows.append(squares.mean(0) * share)
            self._columns.append((inputs.square() * (of_token / of_token.mean().clamp(min=1e-30))).sum(0))
        self._steps = [LEVELS * _UNEVEN, levels * _UNEVEN]

    def of(self, exponents: torch.Tensor, block: int | None = None) -> float:
        """KL divergence, in nats, with powers of two as factors: a scale for each row, or for each block of it."""
        factors = torch.exp2(exponents)
        if block is None:
            return self._value(factors, None)
        cost = float(self._changes(factors, block).sum())
        squares = factors.square()
        for weight, rows, columns in zip(self._weights, self._rows, self._columns, strict=True):
            largest = (weight * factors).reshape(len(weight), -1, block).amax(2) / (LEVELS * _UNEVEN)
            cost += float((rows @ largest.square()) @ (columns / squares).reshape(-1, block).sum(1))
        return cost

    def least(self) -> torch.Tensor:
        """Whole exponents [columns] of the factors that cost least."""
        columns = torch.log2(self._inputs.pow(4).mean(0).pow(0.25).clamp(min=1e-8))
        weights = torch.log2(torch.stack([weight.amax(0) for weight in self._weights]).amax(0).clamp(min=1e-8))
        starts = [torch.zeros_like(columns)] + [share * columns - (1 - share) * weights for share in _TRIED]
        found = self._descended(min((one - one.median() for one in starts), key=self.of))
        tried = [torch.round(found + offset / _OFFSETS) for offset in range(_OFFSETS)]
        best = min(tried, key=self.of)
        return best - torch.round(best.median())

    def _descended(self, exponents: torch.Tensor) -> torch.Tensor:
        """Adam, slower with every step."""
        mean, power = torch.zeros_like(exponents), torch.zeros_like(exponents)
        gradient = torch.empty_like(exponents)
        for step in range(1, _DESCENTS + 1):
            self._value(torch.exp2(exponents), gradient)
            mean = 0.9 * mean + 0.1 * gradient
            power = 0.95 * power + 0.05 * gradient.square()
            slope = mean / (1 - 0.9**step) / ((power / (1 - 0.95**step)).sqrt() + 1e-30)
            exponents = exponents - _RATE * (1 - (step - 1) / _DESCENTS + _SLOWEST) * slope
        return exponents

    def _value(self, factors: torch.Tensor, gradient: torch.Tensor | None) -> float:
        """The cost with a scale for each row, and its gradient by the factors' logarithms, put into `gradient`."""
        steps, at = (self._inputs / factors).max(1)
        steps = steps[:, None] / self._steps[0] * factors
        changes = torch.minimum(steps, self._inputs).square_().mul_(self._moved)
        cost = float(changes.sum())
        if gradient is not None:
            changes.mul_(steps < self._inputs)
            torch.sum(2 * changes, 0, out=gradient)
            gradient.index_add_(0, at, -2 * changes.sum(1))
        squares = factors.square()
        for weight, rows, columns in zip(self._weights, self._rows, self._columns, strict=True):
            largest, at = (weight * factors).max(1)
            of_rows, of_columns = (largest / self._steps[1]).square() * rows, columns / squares
            lost, fed = float(of_rows.sum()), float(of_columns.sum())
            cost += lost * fed
            if gradient is not None:
                gradient.index_add_(0, at, 2 * fed * of_rows)
                gradient -= 2 * lost * of_columns
        return cost

    def _changes(self, factors: torch.Tensor, block: int) -> torch.Tensor:
        """What rounding inputs costs [tokens, blocks], with a scale for each block."""
        inputs = self._inputs.reshape(len(self._inputs), -1, block)
        scaled = (self._inputs / factors).reshape(inputs.shape).amax(2, keepdim=True) / self._steps[0]
        steps = scaled * factors.reshape(-1, block)
        moved = self._moved.reshape(inputs.shape)
        return torch.minimum(steps, inputs).square_().mul_(moved).sum(2)
