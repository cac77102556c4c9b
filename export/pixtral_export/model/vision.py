"""Pixtral's vision encoder and adapter in torch: pixels in, one decoder-sized feature per patch out.

Specification sections 1.3 and 1.4. One image a row; images of one batch share a patch grid, so no mask is needed and a
patch never sees another image. No norm follows the last block.

Shapes: B images, H and W pixels, P patches (row-major), D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixtral_export.model.ops import side_by_side
from pixtral_export.model.rope import vision_rope_tables
from pixtral_export.model.transformer import Linear, RMSNorm, TransformerBlock
from pixtral_runtime.bundle.config import ModelConfig, VisionConfig


def position_ids(rows: int, columns: int, config: VisionConfig) -> Tensor:
    """Rows of the rotary tables for a grid of patches in the order of `patch_order`: (rows · columns,)."""
    ids = torch.arange(rows)[:, None] * config.max_grid + torch.arange(columns)[None]
    return patch_order(ids[None, None], config.spatial_merge_size).flatten()


def patch_order(grid: Tensor, merge: int) -> Tensor:
    """(B, D, rows, columns) -> (B, P, D): tokens row-major, and within a token its merge² patches row-major."""
    if merge > 1:
        grid = grid.unflatten(3, (-1, merge)).unflatten(2, (-1, merge))  # (B, D, R, dy, C, dx)
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)
    return grid.flatten(2).transpose(1, 2)


class PatchEmbedding(nn.Module):
    """Cuts images into patches and numbers the patches by row and column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_conv = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.ln_pre = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) -> hidden (B, P, D) and position_ids (B, P)."""
        grid = self.patch_conv(pixels)  # (B, D, rows, columns)
        batch, _, rows, columns = grid.shape
        positions = position_ids(rows, columns, self.config)  # (P,)
        return self.ln_pre(patch_order(grid, self.config.spatial_merge_size)), positions[None].expand(batch, -1)


class Adapter(nn.Module):
    """Maps vision features to the decoder's width: linear, exact (erf) GELU, linear.

    In the Mistral 3 family after a norm, and a product that merges the patches of a token (specification section 4.3).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.patches = config.vision.hidden_size, config.vision.spatial_merge_size**2
        self.norm = RMSNorm(width, config.decoder.norm_eps) if config.adapter_norm else nn.Identity()
        self.merging_layer = Linear(width * self.patches, width) if self.patches > 1 else nn.Identity()
        self.w_in = Linear(config.vision.hidden_size, config.decoder.dim, bias=config.adapter_bias)
        self.w_out = Linear(config.decoder.dim, config.decoder.dim, bias=config.adapter_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, P, D) -> (B, P / merge², decoder's D)."""
        x = self.merging_layer(side_by_side(self.norm(x), self.patches))
        y: Tensor = self.w_out(F.gelu(self.w_in(x)))
        return y


def vision_block(config: VisionConfig) -> TransformerBlock:
    heads = config.num_attention_heads
    return TransformerBlock(
        config.hidden_size,
        config.intermediate_size,
        heads,
        heads,
        config.head_dim,
        config.norm_eps,
        config.hidden_act,
    )


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(vision_block(config) for _ in range(config.num_hidden_layers))


class VisionEncoder(PatchEmbedding):
    """The whole tower, named as in Mistral's checkpoint: patch_conv, ln_pre, transformer.layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.transformer = VisionTransformer(config)
        cos, sin = vision_rope_tables(config)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) -> features (B, P, D)."""
        x: Tensor
        x, position_ids = self(pixels)
        for layer in self.transformer.layers:
            x, _, _ = layer(x, self.cos, self.sin, position_ids)
        return x
