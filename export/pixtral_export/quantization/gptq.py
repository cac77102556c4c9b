"""GPTQ: round a weight so that the layer's output, not the weight, changes least (arXiv 2210.17323).

Rows of the weight are rounded one after the other, those that matter most first; each rounding error is made up for by
the rows still to come, as the inputs' second moments say. Scales are those of plain rounding, found before. The moments
of a wide layer are kept for spans of `SPAN_INPUTS` only: the Hessian of the 12B's w2 would take 0.8 GB whole and its
factorization two thirds of the time, for correlations that matter little.

Shapes: K inputs, N outputs, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pixtral_export.quantization.formats import Format, Storable, expand_scales, group_scales

SPAN_INPUTS = 4096  # inputs whose errors may compensate each other; a multiple of every group size
BLOCK_ROWS = 64  # rows rounded before their errors are applied to the rest of the span at once
DAMPING_SHARE = 0.1  # of the mean diagonal: on text not calibrated with, better than 0.01 in every layer tried


class Moments:
    """Sums of x xᵀ over tokens, in blocks along the diagonal."""

    def __init__(self, width: int) -> None:
        self.blocks = [torch.zeros(end - start, end - start) for start, end in spans(width)]

    def add(self, x: Tensor) -> None:
        """x (M, K)."""
        for block, (start, end) in zip(self.blocks, spans(x.shape[1]), strict=True):
            part = x[:, start:end]
            block.addmm_(part.T, part)


def spans(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + SPAN_INPUTS, width)) for start in range(0, width, SPAN_INPUTS)]


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a span's moments H: the order of its inputs, and U with H⁻¹ = Uᵀ U in that order."""

    order: Tensor  # by falling diagonal of H
    upper: Tensor
    importance: Tensor  # the diagonal, in the span's own order


def factor(moments: Moments) -> list[Factor]:
    """One factor a span. Empties `moments`.

    With rows and columns reversed, H = L Lᵀ gives U = L⁻¹ reversed: no inverse of H is needed.
    """
    factors = []
    while moments.blocks:
        block = moments.blocks.pop(0)
        importance = block.diagonal().clone()
        order = importance.argsort(descending=True, stable=True)
        backward = order.flip(0)
        block = block[backward][:, backward]
        block.diagonal().add_(DAMPING_SHARE * importance.mean().clamp(min=1e-8))
        with one_thread():
            lower = torch.linalg.cholesky(block)
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
        factors.append(Factor(order, inverse.flip(0, 1), importance))
    return factors


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread what has other last bits in two; seen of Cholesky and of products of 5 to 11 rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gptq(
    weight: Tensor, factors: list[Factor], format: Format, group: int | None, storable: Storable
) -> tuple[Tensor, Tensor]:
    """Codes (K, N) and scales (K/group, N) or (N,), both float32, of a weight (K, N), which is left as it is."""
    importance = torch.cat([part.importance for part in factors])
    scales = group_scales(weight, format, group, storable, importance=importance)
    codes, steps = torch.empty_like(weight), expand_scales(scales, len(weight)).expand_as(weight)
    for part, (start, end) in zip(factors, spans(len(weight)), strict=True):
        place = start + part.order
        rest, upper = weight[place], part.upper
        for first in range(0, end - start, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, end - start)
            errors = torch.empty(last - first, weight.shape[1])
            for row in range(first, last):
                step = steps[place[row]]
                code = format.round(rest[row] / step)
                codes[place[row]] = code
                error = (rest[row] - code * step) / upper[row, row]
                rest[row:last].addr_(upper[row, row:last], error, alpha=-1)
                errors[row - first] = error
            rest[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return codes, scales
