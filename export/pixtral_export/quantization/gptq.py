"""GPTQ: round a weight so that the layer's output, not the weight, changes least (arXiv 2210.17323).

Rows of the weight are rounded one after the other; each rounding error is made up for by the rows still to come, as
the inputs' second moments say. The moments of a wide layer are kept for spans of `SPAN_INPUTS` only: the Hessian of the
12B's w2 would take 0.8 GB whole and its factorization two thirds of the time, for correlations that matter little.

Shapes: K inputs, N outputs, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixtral_export.quantization.formats import Format, Storable, group_scales

SPAN_INPUTS = 4096  # inputs whose errors may compensate each other; a multiple of every group size
BLOCK_ROWS = 64  # rows rounded before their errors are applied to the rest of the span at once
DAMPING_SHARE = 0.01  # of the mean diagonal


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


def factor(moments: Moments) -> list[Tensor]:
    """Upper Cholesky factors U of the inverse moments, H⁻¹ = Uᵀ U, one a span. Empties `moments`.

    With rows and columns reversed, H = L Lᵀ gives U = L⁻¹ reversed: no inverse of H is needed.
    """
    factors = []
    while moments.blocks:
        block = moments.blocks.pop(0).flip(0, 1)
        block.diagonal().add_(DAMPING_SHARE * block.diagonal().mean().clamp(min=1e-8))
        lower = torch.linalg.cholesky(block)
        factors.append(torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False).flip(0, 1))
    return factors


def gptq(
    weight: Tensor, factors: list[Tensor], format: Format, group: int, storable: Storable
) -> tuple[Tensor, Tensor]:
    """Codes (K, N) and scales (K/group, N), both float32, of a weight (K, N), which is left as it is."""
    codes = torch.empty_like(weight)
    scales = torch.empty(len(weight) // group, weight.shape[1])
    for upper, (start, end) in zip(factors, spans(len(weight)), strict=True):
        rest = weight[start:end].clone()
        for first in range(0, end - start, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, end - start)
            errors = torch.empty(last - first, weight.shape[1])
            for row in range(first, last):
                if row % group == 0:
                    # from weights that carry the errors of all rows before the group
                    whole = rest[row : row + group]
                    scales[(start + row) // group] = group_scales(whole, format, None, storable, search=True)
                scale = scales[(start + row) // group]
                code = format.round(rest[row] / scale)
                codes[start + row] = code
                error = (rest[row] - code * scale) / upper[row, row]
                rest[row:last].addr_(upper[row, row:last], error, alpha=-1)
                errors[row - first] = error
            rest[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return codes, scales
