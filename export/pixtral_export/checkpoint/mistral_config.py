"""From Mistral's `params.json` to a ModelConfig. Specification sections 1.1 and 4."""

from __future__ import annotations

from pathlib import Path

from pixtral_export.checkpoint.config_file import (
    MAX_POSITION,
    MOST_LAYERS,
    VISION_DEFAULTS,
    Section,
    checked,
    image_tokens,
    read_json,
    vision_config,
)
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, QueryScale, Yarn

MISTRAL_CONFIG = "params.json"
PATCH_MERGE = "patch_merge"  # how Mistral's files call the merging of patches


def read_mistral_config(file: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read `params.json`. Returns the configuration and warnings. Raises CheckpointError."""
    root = Section(file, read_json(file), {})
    encoder = root.section("vision_encoder", VISION_DEFAULTS)
    merge = encoder.integer("spatial_merge_size", 1)
    encoder.only("mm_projector_id", *((None, "") if merge == 1 else (PATCH_MERGE,)))
    for key in ("rope_scaling", "sliding_window"):
        root.only(key, None)
    root.only("moe", None, kind="a mixture of experts")
    yarn = None if root.get("yarn") is None else _yarn(root.section("yarn", {}))
    scale = None if root.get("llama_4_scaling") is None else _query_scale(root.section("llama_4_scaling", {}))
    dim, heads = root.integer("dim"), root.integer("n_heads")
    longest = MAX_POSITION if yarn is None else yarn.max_position
    positions = [root.integer(key, longest) for key in ("max_position_embeddings", "max_seq_len")]
    decoder = DecoderConfig(
        dim=dim,
        n_layers=root.integer("n_layers", most=MOST_LAYERS),
        head_dim=root.integer("head_dim", dim // heads),
        hidden_dim=root.integer("hidden_dim"),
        n_heads=heads,
        n_kv_heads=root.integer("n_kv_heads"),
        vocab_size=root.integer("vocab_size"),
        rope_theta=root.number("rope_theta"),
        norm_eps=root.number("norm_eps", 1e-5),
        max_position=min(*positions, longest),
        yarn=yarn,
        query_scale=scale,
        tied_embeddings=root.boolean("tied_embeddings", False),
    )
    tokens, warnings = image_tokens(encoder, "image_token_id")
    vision = vision_config(encoder, encoder.number("rope_theta"), merge=merge)
    bias, norm = encoder.boolean("adapter_bias", True), encoder.boolean("add_pre_mm_projector_layer_norm", False)
    return checked(ModelConfig(vision, decoder, tokens, bias, norm), file), warnings


def _yarn(section: Section) -> Yarn:
    section.known("factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale")
    section.only("apply_scale", None, False)
    return Yarn(
        factor=section.number("factor"),
        original_max_position=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta"),
        beta_slow=section.number("alpha"),
    )


def _query_scale(section: Section) -> QueryScale:
    section.known("beta", "original_max_position_embeddings")
    return QueryScale(section.number("beta"), section.integer("original_max_position_embeddings"))
