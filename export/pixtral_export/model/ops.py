"""The operations whose ONNX form we choose ourselves.

Each function has an eager meaning in plain (differentiable) torch. While torch traces a module for export it emits
the standard ONNX operator of the same meaning instead, so that a graph holds one `Attention` node where a translation
of the torch code would hold ten small ones, and TensorRT recognizes its fused kernels.

Shapes: B batch, N query heads, K key/value heads, G query heads a key head, T tokens, C cache rows, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OPSET = 24  # the first with TensorScatter


def _onnx(op: str, inputs: tuple[Tensor, ...], like: Tensor, **attributes: Any) -> Tensor:
    """Emit a standard-domain ONNX node whose single output has the shape and dtype of `like`."""
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET)


def _reshape(x: Tensor, shape: tuple[int, ...], recipe: tuple[int, ...]) -> Tensor:
    """ONNX Reshape by a constant recipe, where 0 keeps a dimension; torch would compute it from Shape nodes."""
    if not torch.compiler.is_exporting():
        return x.reshape(shape)
    inputs = (x, torch.tensor(recipe, dtype=torch.int64))
    return torch.onnx.ops.symbolic("Reshape", inputs, {}, dtype=x.dtype, shape=shape, version=OPSET)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotate the halves of each head by the angles of its position: ONNX RotaryEmbedding-23, not interleaved.

    x (B, N, T, E); cos and sin (rows, E/2); position_ids (B, T) int64 row numbers. Returns x's shape and dtype.
    """
    if torch.compiler.is_exporting():
        return _onnx("RotaryEmbedding", (x, cos, sin, position_ids), like=x)
    c, s = cos[position_ids][:, None], sin[position_ids][:, None]  # (B, 1, T, E/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, N·E) -> (B, N, T, E), with a constant Reshape that leaves B and T as they are."""
    batch, tokens, width = x.shape
    heads = width // head_dim
    return _reshape(x, (batch, tokens, heads, head_dim), (0, 0, heads, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, T, E) -> (B, T, N·E), the inverse of `split_heads`."""
    batch, heads, tokens, head_dim = x.shape
    return _reshape(x.transpose(1, 2), (batch, tokens, heads * head_dim), (0, 0, heads * head_dim))


def side_by_side(x: Tensor, count: int) -> Tensor:
    """(B, P, D) -> (B, P / count, D · count): rows that follow each other as one, channel by channel."""
    if count == 1:
        return x
    batch, patches, width = x.shape
    apart = _reshape(x, (batch, patches // count, count, width), (0, -1, count, width)).transpose(2, 3)
    return _reshape(apart, (batch, patches // count, width * count), (0, 0, width * count))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped queries: ONNX Attention-24 with one output.

    q (B, N, T, E); k and v (B, K, C, E); mask (B, 1, G·T, C) bool, True where a query may look, or None for everywhere.
    The G = N / K queries that share a key head stand below each other, so `group_rows` makes the mask. A kernel then
    reads a key once for all of them: ONNX Runtime's decodes 2.5 times as fast as with heads that share.
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    if heads != kv_heads:
        q = _reshape(q, (batch, kv_heads, heads // kv_heads * tokens, head_dim), (0, kv_heads, -1, 0))
    if torch.compiler.is_exporting():
        y = _onnx("Attention", (q, k, v) if mask is None else (q, k, v, mask), like=q)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y if heads == kv_heads else _reshape(y, (batch, heads, tokens, head_dim), (0, heads, -1, 0))


def group_rows(mask: Tensor, groups: int) -> Tensor:
    """(B, 1, T, C) -> (B, 1, G·T, C): a mask's rows for `groups` queries a key head, as `attention` takes it."""
    return mask.repeat(1, 1, groups, 1) if groups > 1 else mask


def cache_update(cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    """Write `new` rows into each slot of the cache from its own index on: ONNX TensorScatter-24, axis 2, linear.

    cache (B, K, C, E); new (B, K, T, E); write_index (B,) int64. Returns the updated cache; eager code gets a copy, a
    runtime that binds input and output to one buffer updates in place.
    """
    if torch.compiler.is_exporting():
        return _onnx("TensorScatter", (cache, new, write_index), like=cache, axis=2, mode="linear")
    updated = cache.clone()
    for slot, start in enumerate(write_index.tolist()):
        updated[slot, :, start : start + new.shape[2]] = new[slot]
    return updated


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis with statistics in float32: ONNX RMSNormalization-23.

    The normalized value is cast back to x's dtype before the multiplication with the weight (specification section
    1.3).
    """
    if torch.compiler.is_exporting():
        return _onnx("RMSNormalization", (x, weight), like=x, axis=-1, epsilon=eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
