"""Rounds a matrix to 4 bits one column after another, and lets later columns make up for what earlier ones lost.

What counts is how far the matrix's products over calibration texts move (Frantar et al., "GPTQ", 2022). Columns with
large inputs make others follow, so the products keep more than if each weight were rounded to the nearest.
"""

from __future__ import annotations

import torch

from edgeprompt.base.blockwise import BlockWeights

BLOCK = 32
DAMPING = 0.05
"""Added to the second moments of inputs, relative to their mean: how far calibration texts are trusted."""
_SHRINK = (1.0, 0.95, 0.9, 0.85)
"""Shares of a block's range that its 16 values may span."""
_FARTHEST = 1.5
"""Steps that a weight may be moved by what others lost, so that every block stays recognisably the base's."""
_TINIEST_HALF = 2.0**-24


def moments(inputs: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor [columns, columns] of the inverse second moments of inputs [tokens, columns]."""
    found = inputs.T @ inputs / len(inputs)
    diagonal = found.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=1e-12)
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(found)), upper=True)
    return factor


def quantize_affine_fed(weight: torch.Tensor, factor: torch.Tensor) -> tuple[BlockWeights, BlockWeights]:
    """Quantise [rows, columns] to 4 bits with offsets of 4 bits, as `edgeprompt.base.blockwise.quantize_affine` does.

    A weight that lies on such a grid already comes back as it was: nothing is lost that others would make up for.

    Args:
        weight: Its columns are whole blocks of `BLOCK`.
        factor: Of `moments`.

    Returns:
        The blocks with integer zero points, and the offsets [rows, columns / `BLOCK`], padded to whole blocks.
    """
    rows, columns = weight.shape
    blocks = columns // BLOCK
    left = weight.detach().float().clone()
    importance = factor.diagonal().square().reciprocal()
    steps = _offset_steps(left)
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    scales, zeros, offsets = (torch.empty((rows, blocks)) for _ in range(3))
    for block in range(blocks):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        part, inner, own = left[:, here].clone(), factor[here, here], weight[:, here].float()
        step = steps[:, block // BLOCK, None]
        scale, zero, offset = _grid(part, importance[here], step)
        errors, reach = torch.empty_like(part), _FARTHEST * scale
        for at in range(BLOCK):
            wanted = own[:, at, None]
            column = torch.minimum(torch.maximum(part[:, at, None], wanted - reach), wanted + reach)
            code = torch.round((column + zero * scale - offset * step) / scale).clamp_(0, 15)
            error = (column - (code - zero) * scale - offset * step) / inner[at, at]
            part[:, at + 1 :] -= error * inner[at, at + 1 :]
            errors[:, at], codes[:, here.start + at] = error[:, 0], code[:, 0].to(torch.uint8)
        left[:, here.stop :] -= errors @ factor[here, here.stop :]
        scales[:, block], zeros[:, block], offsets[:, block] = scale[:, 0], zero[:, 0], offset[:, 0]
    padded = torch.nn.functional.pad(offsets + 8, (0, -blocks % BLOCK), value=8)
    middle = torch.full(steps.shape, 8, dtype=torch.uint8)
    return (
        BlockWeights(codes.reshape(rows, blocks, BLOCK), scales, zeros.to(torch.uint8), columns, 4),
        BlockWeights(padded.to(torch.uint8).reshape(rows, -1, BLOCK), steps, middle, padded.shape[1], 4),
    )


def _offset_steps(weight: torch.Tensor) -> torch.Tensor:
    """Steps [rows, runs] of the offsets of `BLOCK` blocks each: what the largest of them needs, in 7 of them."""
    values = weight.reshape(len(weight), -1, BLOCK)
    low = values.amin(2)
    scale = _half((values.amax(2) - low) / 15)
    offset = (low + torch.round(-low / scale).clamp(0, 15) * scale).abs()
    offset = torch.nn.functional.pad(offset, (0, -offset.shape[1] % BLOCK))
    return _half(offset.reshape(len(weight), -1, BLOCK).amax(2) / 7)


def _grid(
    part: torch.Tensor, importance: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, zero point and offset in steps [rows, 1] of blocks [rows, `BLOCK`]: those that lose least."""
    low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(low) for _ in range(3)]
    for shrink in _SHRINK:
        scale = _half((high - low) * shrink / 15)
        minimum = low + (high - low) * (1 - shrink) / 2
        zero = torch.round(-minimum / scale).clamp_(0, 15)
        offset = torch.round((minimum + zero * scale) / step).clamp_(-8, 7)
        minimum = offset * step - zero * scale
        lost = torch.round((part - minimum) / scale).clamp_(0, 15) * scale + minimum - part
        error = (lost.square() * importance).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, *pair) for pair in zip((scale, zero, offset), best, strict=True)]
    return best[0], best[1], best[2]


def _half(scales: torch.Tensor) -> torch.Tensor:
    """As float16 holds them, and so stores them."""
    return scales.clamp(max=65504.0).half().float().clamp(min=_TINIEST_HALF)
