"""What TensorRT's attention means, in NumPy, and what becomes of it where a kernel adds up in float16.

Shapes: B batch, N query heads, K key/value heads, T tokens, C cache rows, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pixtral_engines.tensors import Tensor, UnknownLayer, wide
from pixtral_runtime.backends.session import Array

PRODUCTS_AT_ONCE = 16  # that a tensor core of float16 adds up before it rounds


def exact(a: Array, b: Array) -> Array:
    """a (…, T, K) by b (…, K, E), summed in float32."""
    result: Array = a @ b
    return result


def in_float16(a: Array, b: Array) -> Array:
    """The same in float16 as a tensor core does it: its sums are rounded after every 16 products."""
    a, b = (x.astype(np.float16).astype(np.float32) for x in (a, b))
    total: Array = np.zeros(1, np.float16)
    for start in range(0, b.shape[-2], PRODUCTS_AT_ONCE):
        here = slice(start, start + PRODUCTS_AT_ONCE)
        total = (total + a[..., here] @ b[..., here, :]).astype(np.float16)
    return wide(total)


def attention(
    layer: Any, inputs: Sequence[Array], output: Tensor, product: Callable[[Array, Array], Array] = exact
) -> Array:
    """softmax(q kᵀ + mask) v with q (B, N, T, E) and k, v (B, K, C, E); TensorRT scales nothing here.

    `product` is that of two matrices. A boolean mask is True where a query may look, any other is added. Both causal
    kinds look at rows up to the query's own, counted from the first row (UPPER_LEFT) or from the last (LOWER_RIGHT).
    Lengths (B,) end the rows.
    """
    attention = layer.attention
    forms = {attention.query_form.name, attention.key_value_form.name}
    if forms != {"PADDED_BHND"} or attention.norm_op.name != "SOFTMAX" or _name(attention.normalization_quantize_scale):
        raise UnknownLayer(layer, "the packed, unnormalized or quantized form")
    names = [_name(layer.get_input(n)) for n in range(layer.num_inputs)]
    mask, lengths = (
        None if role is None else inputs[names.index(role.name)]
        for role in (attention.mask, attention.key_value_lengths)
    )
    q, k, v = map(wide, inputs[:3])
    batch, heads, tokens, head_dim = q.shape
    rows = k.shape[2]
    grouped = q.reshape(batch, k.shape[1], -1, tokens, head_dim)  # (B, K, N/K, T, E)
    scores = product(grouped, k[:, :, None].swapaxes(-1, -2)).reshape(batch, heads, tokens, rows)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + wide(mask)
    if (kind := attention.causal_kind.name) != "NONE":
        offset = rows - tokens if kind == "LOWER_RIGHT" else 0
        scores = np.where(np.arange(rows) <= np.arange(tokens)[:, None] + offset, scores, -np.inf)
    if lengths is not None:
        scores = np.where(np.arange(rows) < lengths[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = product(weights.reshape(*grouped.shape[:4], rows), v[:, :, None]).reshape(batch, heads, tokens, v.shape[-1])
    y /= weights.sum(-1, keepdims=True)
    return y


def _name(tensor: Any) -> str:
    return "" if tensor is None else str(tensor.name)
