"""Pixtral's language model in torch: token embedding, decoder blocks with an explicit cache, output head.

Specification section 1.4. The cache is an input and an output of every block, a slot a row, so that a runtime can bind
both to one buffer; the mask is computed once from the positions and shared by all blocks.

Shapes: B slots, T new tokens, C cache rows, D hidden, V vocabulary, F image features, R rows that want logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixtral_export.model.ops import group_rows
from pixtral_export.model.rope import decoder_rope_tables
from pixtral_export.model.transformer import Linear, RMSNorm, TransformerBlock
from pixtral_runtime.bundle.config import DecoderConfig


def causal_mask(position_ids: Tensor, past_k: Tensor, groups: int = 1) -> Tensor:
    """Which cache rows each new token may look at: those at or before its own position.

    position_ids (B, T); past_k (B, K, C, E). Returns (B, 1, G·T, C) bool, the rows of `ops.group_rows`. Rows after a
    slot's filled part may hold anything finite: no token has a position that reaches them.
    """
    rows = torch.arange(past_k.shape[2])
    return rows[None, None, None, :] <= torch.cat([position_ids] * groups, dim=1)[:, None, :, None]


class Embedding(nn.Module):
    """Token embeddings, with image features in the place of [IMG] tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))

    def forward(self, token_ids: Tensor, image_features: Tensor, feature_index: Tensor) -> Tensor:
        """token_ids (B, T); image_features (F, D), F >= 1; feature_index (B, T): the feature's row, or -1 for text."""
        text = F.embedding(token_ids, self.weight)  # (B, T, D)
        image = F.embedding(feature_index.clamp(min=0), image_features)  # (B, T, D)
        return torch.where((feature_index >= 0)[..., None], image, text)


class Head(nn.Module):
    """Final norm and output projection, for the rows that want logits only."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)

    def forward(self, x: Tensor, logits_index: Tensor) -> Tensor:
        """x (B, T, D); logits_index (R,): rows of x seen as (B·T, D). Returns logits (R, V) in float32."""
        rows = F.embedding(logits_index, x.flatten(0, 1))  # (R, D)
        logits: Tensor = self.output(self.norm(rows))
        return logits.float()


def decoder_block(config: DecoderConfig) -> TransformerBlock:
    return TransformerBlock(
        config.dim,
        config.hidden_dim,
        config.n_heads,
        config.n_kv_heads,
        config.head_dim,
        config.norm_eps,
        config.hidden_act,
    )


class Decoder(Head):
    """Blocks and head, named as in Mistral's checkpoint: layers, norm, output."""

    def __init__(self, config: DecoderConfig, positions: int) -> None:
        super().__init__(config)
        self.groups = config.n_heads // config.n_kv_heads
        self.layers = nn.ModuleList(decoder_block(config) for _ in range(config.n_layers))
        names = ("cos", "sin", "query_cos", "query_sin")
        for name, table in zip(names, decoder_rope_tables(config, positions), strict=False):
            self.register_buffer(name, table.float(), persistent=False)
        self.own_query_tables = config.query_scale is not None

    def hidden(self, x: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        """Full forward without a cache: x (B, T, D), position_ids (B, T), mask (B, 1, T, T) -> (B, T, D)."""
        mask = group_rows(mask, self.groups)
        of_queries = (self.query_cos, self.query_sin) if self.own_query_tables else ()
        for layer in self.layers:
            x, _, _ = layer(x, self.cos, self.sin, position_ids, mask, None, None, None, *of_queries)
        return x
