"""Number formats for weights, and rounding to them.

A quantized weight is a tensor of codes, whole multiples of a scale, and the scales themselves, in the layout of ONNX
DequantizeLinear: one scale for each output column, or one for each `group` of rows along K. All schemes are symmetric:
zero stays zero and no zero points are stored. Scales are positive. A negative one would let the larger of a group's two
ends become int4's -8, for 17 % less divergence by rounding, but TensorRT documents only "strictly positive" ones.

Shapes: K inputs and N outputs of a linear layer, weights (K, N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A storage type: its name in this toolkit and in ONNX, and the ends of the range that codes use."""

    name: str
    bits: int
    largest: float
    lowest: float

    def round(self, x: Tensor) -> Tensor:
        """The nearest representable values, ties to even, clipped to the range. float32 in and out."""
        x = x.clamp(self.lowest, self.largest)
        if self.name == "float8e4m3fn":
            return x.to(torch.float8_e4m3fn).float()
        if self.name == "float4e2m1":  # six times faster than by way of ml_dtypes
            power = (x.abs().clamp_(min=1).view(torch.int32) & EXPONENT_BITS).view(torch.float32)  # largest 2ⁿ ≤ |x|
            step = power.mul_(0.5)  # one bit of mantissa; below 1 the steps stay as they are there
            return x.div_(step).round_().mul_(step)
        return x.round()

    def pack(self, codes: Tensor) -> Tensor:
        """Codes, float32 and exactly representable, as the bytes ONNX stores: uint8, flat, low nibble first."""
        if self.name == "int8":
            return codes.to(torch.int8).reshape(-1).view(torch.uint8)
        if self.name == "float8e4m3fn":
            return codes.to(torch.float8_e4m3fn).reshape(-1).view(torch.uint8)
        if self.name == "float4e2m1":
            raw = torch.from_numpy(codes.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
        else:
            raw = codes.to(torch.int8).view(torch.uint8)
        nibbles = (raw & 0xF).reshape(-1)
        return nibbles[0::2] | (nibbles[1::2] << 4)


EXPONENT_BITS = 0x7F80_0000  # of a float32

INT4 = Format("int4", 4, 7, -8)
INT8 = Format("int8", 8, 127, -127)
FP8 = Format("float8e4m3fn", 8, 448, -448)
FP4 = Format("float4e2m1", 4, 6, -6)
FORMATS = {format.name: format for format in (INT4, INT8, FP8, FP4)}

SCALE_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Candidates for a scale, as shares of the one that reaches the largest value: clipping it rounds the others finer."""
OCTAVE = tuple(2 ** (n / 8) for n in range(8))
"""Those of E4M3, whose steps grow with the values: none is clipped, they only fall elsewhere between the steps."""


Storable = Callable[[Tensor], Tensor]
"""Rounds scales to values that the file can hold, never zero. Codes are computed with the scale that is stored."""


def stored_as(dtype: str) -> Storable:
    """For scales of a float type."""
    kind = getattr(torch, dtype)
    smallest = 2.0**-24 if dtype == "float16" else torch.finfo(kind).tiny  # float16 scales may be subnormal
    return lambda scale: scale.clamp(min=smallest).to(kind).float()


def stored_as_e4m3(unit: Tensor) -> Storable:
    """For scales that are E4M3 multiples of a tensor's one float scale, `unit`."""
    smallest = 2.0**-9
    return lambda scale: FP8.round((scale / unit).clamp(min=smallest)) * unit


def group_scales(
    weight: Tensor, format: Format, group: int | None, storable: Storable, *, importance: Tensor | None = None
) -> Tensor:
    """Scales of a weight (K, N): (K/group, N), or (N,) where `group` is None.

    The ends of a group are representable, unless `importance` (K,) weighs the rows: then a scale has the least squared
    error of the candidates in `SCALE_SHARES` or `OCTAVE` and the one that fits the best of their codes. Without weights
    that search takes off squared error and adds divergence: it clips what matters.
    """
    blocks = weight[None] if group is None else weight.unflatten(0, (-1, group))  # (G, K/G, N)
    full = storable(torch.maximum(blocks.amax(1) / format.largest, blocks.amin(1) / format.lowest))  # (G, N)
    if importance is not None:
        full = _searched(blocks, full, format, storable, importance.view(len(blocks), -1, 1))
    return full[0] if group is None else full


def _searched(blocks: Tensor, full: Tensor, format: Format, storable: Storable, importance: Tensor) -> Tensor:
    """The scales (G, N) of blocks (G, K/G, N) with the least squared error by importance (G, K/G, 1)."""
    best, least = full, torch.full_like(full, torch.inf)

    def consider(scale: Tensor) -> None:
        nonlocal best, least
        error = (format.round(blocks / scale[:, None]) * scale[:, None] - blocks).square_().mul_(importance).sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)

    for share in OCTAVE if format is FP8 else SCALE_SHARES:
        consider(storable(full * share))
    codes = format.round(blocks / best[:, None])
    fitted = (codes * blocks).mul_(importance).sum(1) / codes.square().mul_(importance).sum(1).clamp_(min=1e-30)
    consider(storable(torch.where(fitted > 0, fitted, best)))
    return best


def expand_scales(scale: Tensor, rows: int) -> Tensor:
    """Scales (G, N) or (N,) for each row of a weight: broadcastable to (rows, N)."""
    return scale if scale.dim() == 1 else scale.repeat_interleave(rows // len(scale), 0)


def round_to_nearest(weight: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Codes (K, N) of a weight (K, N)."""
    return format.round(weight / expand_scales(scale, len(weight)))


def fake_quantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """What is left of activations after QuantizeLinear and DequantizeLinear with one static scale."""
    if format is INT8:  # the operator saturates at -128, which no weight code uses
        return (x / scale).round().clamp(-128, 127) * scale
    return format.round(x / scale) * scale
