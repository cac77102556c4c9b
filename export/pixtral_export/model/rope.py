"""Rotary tables: cosines and sines of every position's angles, for the vision tower and the decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from pixtral_runtime.bundle.config import DecoderConfig, VisionConfig


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


def decoder_rope_tables(config: DecoderConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each (positions, head_dim/2) in float64 (specification section 1.4)."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()
