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
    return BlockWeights(
        codes.reshape(rows, blocks, block), scales.reshape(rows, blocks), zeros.reshape(rows, blocks), columns, bits
    )


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
