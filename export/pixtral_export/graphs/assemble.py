"""The three graphs of a bundle: vision, embed and decoder.

Each function traces the pieces of one graph and stamps them together: a prologue, the block once per layer, an
epilogue. Tensor names and shapes come from `pixtral_runtime.bundle.spec`, weights from the plan of the weight file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from pixtral_export.graphs.builder import GraphBuilder
from pixtral_export.graphs.trace import trace, without_weights
from pixtral_export.model import decoder, vision
from pixtral_export.model.parameters import parameters
from pixtral_export.weight_names import DECODER_ROPE, QUERY_ROPE, VISION_ROPE, ExternalWeight
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.spec import GraphSpec, cache_names, graph_spec

BATCH = Dim("B", max=256)
TOKENS = Dim("T", max=65_536)
ROWS = Dim("C", max=1_048_576)


@lru_cache
def _vision_pieces(config: ModelConfig, dtype: torch.dtype) -> tuple[ir.Model, ir.Model, ir.Model]:
    """Patch embedding, block, adapter."""
    v = config.vision
    rows, columns = Dim("rows", max=1024), Dim("columns", max=1024)
    pixels = torch.zeros(2, v.num_channels, 3 * v.token_edge, 5 * v.token_edge, dtype=dtype)
    axes = {0: BATCH, 2: v.token_edge * rows, 3: v.token_edge * columns}
    start = trace(_hollow(lambda: vision.PatchEmbedding(v), dtype), [pixels], [axes])
    hidden = torch.zeros(2, 15, v.hidden_size, dtype=dtype)
    rope = torch.zeros(v.max_grid**2, v.head_dim // 2, dtype=dtype)
    by_token = {0: BATCH, 1: TOKENS}
    block = trace(
        _hollow(lambda: vision.vision_block(v), dtype),
        [hidden, rope, rope, torch.zeros(2, 15, dtype=torch.int64)],
        [by_token, {}, {}, by_token],
    )
    merged = v.spatial_merge_size**2
    hidden = torch.zeros(2, 15 * merged, v.hidden_size, dtype=dtype)
    by_token = {0: BATCH, 1: merged * TOKENS}
    return start, block, trace(_hollow(lambda: vision.Adapter(config), dtype), [hidden], [by_token])


@lru_cache
def _embed_piece(config: ModelConfig, dtype: torch.dtype) -> ir.Model:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    features = torch.zeros(4, config.decoder.dim, dtype=dtype)
    by_token = {0: BATCH, 1: TOKENS}
    module = _hollow(lambda: decoder.Embedding(config.decoder), dtype)
    return trace(module, [ids, features, ids], [by_token, {0: Dim("F", max=1_048_576)}, by_token])


@lru_cache
def _decoder_pieces(config: ModelConfig, dtype: torch.dtype) -> tuple[ir.Model, ir.Model, ir.Model]:
    """Mask, block, head."""
    d = config.decoder
    hidden = torch.zeros(2, 3, d.dim, dtype=dtype)
    positions = torch.zeros(2, 3, dtype=torch.int64)
    past = torch.zeros(2, d.n_kv_heads, 16, d.head_dim, dtype=dtype)
    slot = torch.zeros(2, dtype=torch.int64)
    rope = torch.zeros(32, d.head_dim // 2, dtype=dtype)
    by_token, by_row = {0: BATCH, 1: TOKENS}, {0: BATCH, 2: ROWS}
    groups = d.n_heads // d.n_kv_heads
    start = trace(_Function(partial(decoder.causal_mask, groups=groups)), [positions, past], [by_token, by_row])
    of_queries = [rope, rope] if d.query_scale else []
    mask = torch.zeros(2, 1, 3 * groups, 16, dtype=torch.bool)
    block = trace(
        _hollow(lambda: decoder.decoder_block(d), dtype),
        [hidden, rope, rope, positions, mask, past, past, slot, *of_queries],
        [by_token, {}, {}, by_token, {0: BATCH, 2: groups * TOKENS, 3: ROWS}, by_row, by_row, {0: BATCH}]
        + [{} for _ in of_queries],
    )
    end = trace(_hollow(lambda: decoder.Head(d), dtype), [hidden, slot], [by_token, {0: Dim("R", max=65_536)}])
    return start, block, end


def vision_model(config: ModelConfig, dtype: torch.dtype, builder: GraphBuilder) -> ir.Model:
    """pixels -> image_features."""
    start, block, end = _vision_pieces(config, dtype)
    x, position_ids = builder.stamp(start, "vision_encoder.", builder.inputs("pixels"))
    cos, sin = map(builder.weight, VISION_ROPE)
    for n in range(config.vision.num_hidden_layers):
        x, _, _ = builder.stamp(block, f"vision_encoder.transformer.layers.{n}.", [x, cos, sin, position_ids])
    return builder.finish(builder.stamp(end, "vision_language_adapter.", [x]))


def embed_model(config: ModelConfig, dtype: torch.dtype, builder: GraphBuilder) -> ir.Model:
    """token_ids, image_features, feature_index -> hidden."""
    inputs = builder.inputs("token_ids", "image_features", "feature_index")
    return builder.finish(builder.stamp(_embed_piece(config, dtype), "tok_embeddings.", inputs))


def decoder_model(config: ModelConfig, dtype: torch.dtype, builder: GraphBuilder) -> ir.Model:
    """hidden, position_ids, write_index, logits_index and the past cache -> logits and the present cache."""
    start, block, end = _decoder_pieces(config, dtype)
    layers = config.decoder.n_layers
    x, position_ids, write_index, logits_index = builder.inputs("hidden", "position_ids", "write_index", "logits_index")
    caches = builder.inputs(*cache_names("past", layers))
    (mask,) = builder.stamp(start, "mask.", [position_ids, caches[0]])
    cos, sin = map(builder.weight, DECODER_ROPE)
    of_queries = [builder.weight(name) for name in QUERY_ROPE if config.decoder.query_scale]
    present: list[ir.Value] = []
    for n in range(layers):
        past_k, past_v = caches[2 * n : 2 * n + 2]
        x, *updated = builder.stamp(
            block, f"layers.{n}.", [x, cos, sin, position_ids, mask, past_k, past_v, write_index, *of_queries]
        )
        present += updated
    (logits,) = builder.stamp(end, "", [x, logits_index])
    return builder.finish([logits, *present])


def build_graph(
    name: str,
    config: ModelConfig,
    dtype: str,
    cache_dtype: str | None,
    weights: Mapping[str, ExternalWeight],
    input_scales: Mapping[str, str],
    location: str,
) -> ir.Model:
    """Build the graph called vision, embed or decoder for activations of `dtype` and a KV cache of `cache_dtype`.

    `weights` says what the weight file holds; `input_scales` maps weights with quantized inputs to the inputs' scales.
    """
    spec: GraphSpec = graph_spec(name, config, dtype, cache_dtype)
    model = {"vision": vision_model, "embed": embed_model, "decoder": decoder_model}[name]
    turned = {one.name: one.copy_of for one in parameters(config) if one.copy_of and one.name not in weights}
    return model(config, getattr(torch, dtype), GraphBuilder(spec, weights, input_scales, location, turned))


class _Function(nn.Module):
    """A function as a module, for the tracer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


def _hollow(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        module = build()
    return without_weights(module, dtype)
