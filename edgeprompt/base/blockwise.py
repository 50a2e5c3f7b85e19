"""Blockwise integer weights: the numbers of MatMulNBits and GatherBlockQuantized, there and back.

A weight matrix is [rows, columns]; each run of `block` columns of a row shares a scale and an unsigned zero point:
`weight = (code - zero_point) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84)
_CHUNK_VALUES = 1 << 20
_TINIEST_HALF = 2.0**-24
_ON_GRID = 2.0**-18
"""How far from a multiple of a step, in steps and for each of them, a weight computed in float32 may lie."""


@dataclass(frozen=True)
class BlockWeights:
    """A quantised matrix: `codes [rows, blocks, block]` and `zero_points [rows, blocks]` uint8, `scales` float32."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    columns: int
    bits: int

    def dequantize(self) -> torch.Tensor:
        """The float32 matrix [rows, columns] that the graph computes with."""
        values = (self.codes.to(torch.float32) - self.zero_points.to(torch.float32).unsqueeze(-1)) * self.scales[
            ..., None
        ]
        return values.flatten(1)[:, : self.columns].contiguous()

    def joined(self, other: BlockWeights) -> BlockWeights:
        """The matrix with the columns of another of as many rows behind its own."""
        pairs = ((self.codes, other.codes), (self.scales, other.scales), (self.zero_points, other.zero_points))
        codes, scales, zeros = (torch.cat(pair, dim=1) for pair in pairs)
        return BlockWeights(codes, scales, zeros, self.columns + other.columns, self.bits)

    def packed_codes(self) -> npt.NDArray[np.uint8]:
        """Codes as MatMulNBits stores them, [rows, blocks, block * bits / 8], low nibble first."""
        return _pack(self.codes, self.bits).numpy()

    def packed_zero_points(self) -> npt.NDArray[np.uint8]:
        """Zero points as MatMulNBits stores them, [rows, ceil(blocks * bits / 8)]."""
        return _pack(self.zero_points, self.bits).numpy()


def quantize_blocks(weight: torch.Tensor, *, bits: int = 4, block: int = 32) -> BlockWeights:
    """Quantise [rows, columns] so that the squared error of every block is small.

    Asymmetric round-to-nearest is the start; then narrower ranges and neighbouring zero points are tried, each with
    the scale that is optimal (least squares) for its codes, as llama.cpp's k-quants and HQQ do in their ways.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    weight = torch.nn.functional.pad(weight.detach().float(), (0, blocks * block - columns))
    values = weight.reshape(-1, block)
    parts = [_quantize(part, bits) for part in torch.split(values, max(1, _CHUNK_VALUES // block))]
    codes, scales, zeros = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    scales = half_where_exact(scales).reshape(rows, blocks)
    return BlockWeights(codes.reshape(rows, blocks, block), scales, zeros.reshape(rows, blocks), columns, bits)


def quantize_stored(weight: torch.Tensor, *, block: int = 32) -> BlockWeights:
    """8 bits for weights that lie on a grid of up to 8 bits without offset already, as those of a GGUF file do.

    A block whose weights are multiples of one step (Q5_0, Q8_0) keeps that step, so it comes back as it was; of the
    steps that fit the largest is taken. Others (Q5_1, Q5_K, and Q6_K, whose step changes inside of a block) are rounded
    to a 127th of their largest weight.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    parts = torch.split(weight.detach(), max(1, _CHUNK_VALUES // (blocks * block)))

    def values(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(part.float(), (0, blocks * block - columns)).reshape(-1, block)

    scales = torch.cat([_grid_steps(values(part)) for part in parts])
    codes = torch.empty((rows * blocks, block), dtype=torch.uint8)
    row = 0
    for part in parts:
        here = slice(row, row := row + len(part) * blocks)
        codes[here] = torch.round(values(part) / scales[here, None]).clamp_(-127, 127) + 128
    scales = _half_if_equal(scales).reshape(rows, blocks)
    zeros = torch.full((rows, blocks), 128, dtype=torch.uint8)
    return BlockWeights(codes.reshape(rows, blocks, block), scales, zeros, columns, 8)


def _grid_steps(values: torch.Tensor) -> torch.Tensor:
    """For every row, the largest step of which all its values are multiples, at most 127 of them; else a 127th."""
    largest = values.abs().amax(1).clamp(min=1e-12)
    steps = largest / 127
    left = torch.arange(len(values))
    for count in (*range(1, 33), 127):
        if not len(left):
            break
        step = largest[left] / count
        scaled = values[left] / step[:, None]
        fits = (scaled - torch.round(scaled)).abs().amax(1) <= _ON_GRID * count
        steps[left[fits]] = step[fits]
        left = left[~fits]
    return steps


def _half_if_equal(scales: torch.Tensor) -> torch.Tensor:
    """Scales as the float16 that a file stored them in, where they are that to rounding in float32."""
    half = scales.half().float().clamp(min=_TINIEST_HALF)
    return half if bool(((half - scales).abs() <= scales * 2**-20).all()) else half_where_exact(scales)


def quantize_symmetric(weight: torch.Tensor, *, block: int = 64) -> BlockWeights:
    """Quantise [rows, columns] to 8 bits with the zero point in the middle, which is then not stored."""
    rows, columns = weight.shape
    blocks = -(-columns // block)
    parts = torch.split(weight.detach(), max(1, _CHUNK_VALUES // (blocks * block)))

    def values(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(part.float(), (0, blocks * block - columns)).reshape(len(part), blocks, block)

    scales = half_where_exact(torch.cat([values(part).abs().amax(2).clamp(min=1e-12) / 127 for part in parts]))
    codes = torch.empty((rows, blocks, block), dtype=torch.uint8)
    row = 0
    for part in parts:
        here = slice(row, row := row + len(part))
        codes[here] = torch.round(values(part) / scales[here].unsqueeze(-1)).clamp_(-127, 127) + 128
    return BlockWeights(codes, scales, torch.full((rows, blocks), 128, dtype=torch.uint8), columns, 8)


def quantize_affine(
    weight: torch.Tensor, *, block: int = 32, exact_grid: bool = False
) -> tuple[BlockWeights, torch.Tensor]:
    """Quantise [rows, columns] to 4 bits with a float offset for every block: `code * scale + minimum`.

    MatMulNBits knows integer zero points only, and what rounding them to integers costs is most of what quantisation
    to 4 bits costs. The offset that is left over is returned, to be added by other means. Weights that lie on such a
    grid already, as those of a Q4_1 GGUF file do, come back as they were; with `exact_grid` also those that do not use
    all of its 16 values (Q4_0, Q4_K).

    Returns:
        The blocks with the nearest integer zero points, and the offsets [rows, blocks]: a weight is its dequantised
        value plus its block's offset.
    """
    rows, columns = weight.shape
    if columns % block:
        raise ValueError(f"{columns} columns are not whole blocks of {block}")
    values = weight.detach().float().reshape(-1, block)
    parts = [_quantize_affine(part, exact_grid) for part in torch.split(values, max(1, _CHUNK_VALUES // block))]
    codes, scales, zeros, offsets = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    blocks = columns // block
    weights = BlockWeights(
        codes.reshape(rows, blocks, block), scales.reshape(rows, blocks), zeros.reshape(rows, blocks), columns, 4
    )
    return weights, offsets.reshape(rows, blocks)


def _quantize_affine(
    values: torch.Tensor, exact_grid: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    low = values.amin(1, keepdim=True)
    width = (values.amax(1, keepdim=True) - low).clamp(min=1e-12)
    scale = half_where_exact(width / 15)
    # A file's blocks need not use all 16 values: where fewer steps fit the weights exactly, those are its grid.
    left = torch.arange(len(values)) if exact_grid else torch.arange(0)
    for count in range(15, 0, -1):
        if not len(left):
            break
        step = width[left] / count
        scaled = (values[left] - low[left]) / step
        fits = (scaled - torch.round(scaled)).abs().amax(1) <= _ON_GRID * 16 * count
        scale[left[fits]] = step[fits]
        left = left[~fits]
    codes = torch.round((values - low) / scale).clamp_(0, 15)
    minimum = (values - codes * scale).mean(1, keepdim=True)
    zero = torch.round(-minimum / scale).clamp(0, 15)
    offset = minimum + zero * scale
    return codes.to(torch.uint8), scale.squeeze(1), zero.squeeze(1).to(torch.uint8), offset.squeeze(1)


def half_where_exact(scales: torch.Tensor) -> torch.Tensor:
    """`scales` rounded to float16 where that costs nothing that matters, so that they can be stored as float16.

    A scale far below the others (float16 holds fewer digits of it) belongs to a block that hardly counts.
    """
    half = scales.half().float().clamp(min=_TINIEST_HALF)
    close = (half - scales).abs() <= torch.maximum(scales * 2**-10, scales.mean() * 2**-12)
    return half if bool(close.all()) else scales


def unpack_blocks(
    packed: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zero_points: npt.NDArray[np.uint8] | None,
    *,
    columns: int,
    bits: int,
    block: int,
) -> BlockWeights:
    """Read what MatMulNBits stores; without zero points they are in the middle of the range."""
    blocks = -(-columns // block)
    rows = packed.size // (blocks * block * bits // 8)
    codes = _unpack(torch.from_numpy(packed.reshape(rows, -1)), bits, blocks * block)
    if zero_points is None:
        zeros = torch.full((rows, blocks), 1 << (bits - 1), dtype=torch.uint8)
    else:
        zeros = _unpack(torch.from_numpy(zero_points.reshape(rows, -1)), bits, blocks)
    scale = torch.from_numpy(scales.reshape(rows, blocks).astype(np.float32))
    return BlockWeights(codes.reshape(rows, blocks, block), scale, zeros, columns, bits)


def _quantize(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top = (1 << bits) - 1
    low = values.amin(1, keepdim=True).clamp(max=0)
    high = values.amax(1, keepdim=True).clamp(min=0)
    width = (high - low).clamp(min=1e-12) / top
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero, best_codes = width.clone(), torch.zeros_like(low), torch.zeros_like(values)
    for shrink in _SHRINK if bits < 8 else (1.0,):
        scale = width * shrink
        scaled = values / scale
        middle = torch.round(-low * shrink / scale)
        for shift in (-1.0, 0.0, 1.0) if bits < 8 else (0.0,):
            zero = (middle + shift).clamp(0, top)
            codes = torch.round(scaled + zero).clamp_(0, top)
            steps = codes - zero
            fitted = (values * steps).sum(1, keepdim=True) / (steps * steps).sum(1, keepdim=True).clamp(min=1e-12)
            fitted = torch.where(fitted > 0, fitted, scale)
            error = (steps * fitted - values).square_().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, fitted, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best_codes = torch.where(better, codes, best_codes)
    return best_codes.to(torch.uint8), best_scale.squeeze(1), best_zero.squeeze(1).to(torch.uint8)


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[..., ::2] | (values[..., 1::2] << 4)


def _unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    if bits == 8:
        return packed[:, :count]
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :count]
