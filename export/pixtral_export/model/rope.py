"""Rotary tables: cosines and sines of every position's angles, for the vision tower and the decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixtral_runtime.bundle.config import DecoderConfig, VisionConfig, Yarn


def vision_rope_tables(config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2-D rotary angles, each (max_grid², head_dim/2) in float64.

    Row r·max_grid + c belongs to the patch in row r and column c.

    The even base frequencies turn with the height, the odd ones with the width, and the two halves are concatenated:
    the order the weights were trained with, which differs from the paper's equation (specification section 1.3.1).
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    index = torch.arange(config.max_grid, dtype=torch.float64)[:, None]
    height = (index * frequencies[0::2])[:, None].expand(-1, config.max_grid, -1)
    width = (index * frequencies[1::2])[None].expand(config.max_grid, -1, -1)
    angles = torch.cat([height, width], dim=-1).flatten(0, 1)  # (max_grid², E/2)
    return angles.cos(), angles.sin()


def decoder_rope_tables(config: DecoderConfig, positions: int) -> tuple[Tensor, ...]:
    """Cosine and sine of the rotary angles, each (positions, head_dim/2) in float64 (specification section 1.4).

    Where queries are scaled by their position, two more tables for them: rotating and scaling are one product.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    position = torch.arange(positions, dtype=torch.float64)[:, None]
    factor = 1.0
    if config.yarn is not None:
        frequencies, factor = yarn_frequencies(config, config.yarn), config.yarn.attention_factor
    cos, sin = (position * frequencies).cos() * factor, (position * frequencies).sin() * factor
    if config.query_scale is None:
        return cos, sin
    scale = 1 + config.query_scale.beta * torch.log1p(torch.floor(position / config.query_scale.length))
    return cos, sin, cos * scale, sin * scale


def yarn_frequencies(config: DecoderConfig, yarn: Yarn) -> Tensor:
    """(head_dim/2,) in float64: fast ones as they are, slow ones stretched by the factor, a ramp between them.

    Specification section 4.4.
    """
    dim, base = config.head_dim, config.rope_theta

    def turns_at(beta: float) -> float:
        """The dimension whose angle turns `beta` times within the original length."""
        return dim * math.log(yarn.original_max_position / (beta * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(turns_at(yarn.beta_fast)), 0), min(math.ceil(turns_at(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return plain / yarn.factor * ramp + plain * (1 - ramp)
