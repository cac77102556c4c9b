"""The transformer block that both of Pixtral's towers are made of.

Pre-norm residual block: attention with rotary positions, then a gated SiLU feed-forward. The vision encoder uses it
without mask and cache; the decoder with both. Parameter names are those of Mistral's checkpoint. Linear weights lie as
(in, out), the layout of ONNX MatMul, so that a graph needs no transposition; q and k rows are in the rotate-half order.

Shapes: B batch, T tokens, D hidden, N heads, K key/value heads, E head dim, C cache rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixtral_export.model import ops


class Linear(nn.Module):
    """x @ weight + bias with weight (in, out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an optional in-place cache."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = Linear(dim, n_heads * head_dim)
        self.wk = Linear(dim, n_kv_heads * head_dim)
        self.wv = Linear(dim, n_kv_heads * head_dim)
        self.wo = Linear(n_heads * head_dim, dim)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        past_k: Tensor | None = None,
        past_v: Tensor | None = None,
        write_index: Tensor | None = None,
        query_cos: Tensor | None = None,
        query_sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output (B, T, D) and the keys and values it looked at: the cache where there is one.

        Queries may have rotary tables of their own.
        """
        q, k, v = (ops.split_heads(w(x), self.head_dim) for w in (self.wq, self.wk, self.wv))  # (B, N or K, T, E)
        of_query = (cos, sin) if query_cos is None or query_sin is None else (query_cos, query_sin)
        q = ops.rotary_embedding(q, *of_query, position_ids)
        k = ops.rotary_embedding(k, cos, sin, position_ids)
        if past_k is not None and past_v is not None and write_index is not None:
            k = ops.cache_update(past_k, k, write_index)  # (B, K, C, E)
            v = ops.cache_update(past_v, v, write_index)
        y = ops.attention(q, k, v, mask)  # (B, N, T, E)
        return self.wo(ops.merge_heads(y)), k, v


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), or with another of ACTIVATIONS in silu's place."""

    def __init__(self, dim: int, hidden_dim: int, hidden_act: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.activation(self.w1(x)) * self.w3(x))
        return y


class TransformerBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        hidden_act: str,
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads, head_dim)
        self.feed_forward = FeedForward(dim, hidden_dim, hidden_act)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        past_k: Tensor | None = None,
        past_v: Tensor | None = None,
        write_index: Tensor | None = None,
        query_cos: Tensor | None = None,
        query_sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D); mask (B, 1, N/K·T, C), by `ops.group_rows`; past_k and past_v (B, K, C, E); write_index (B,).

        Returns the residual stream (B, T, D) and the keys and values attention looked at.
        """
        y, k, v = self.attention(
            self.attention_norm(x), cos, sin, position_ids, mask, past_k, past_v, write_index, query_cos, query_sin
        )
        x = x + y
        return x + self.feed_forward(self.ffn_norm(x)), k, v
