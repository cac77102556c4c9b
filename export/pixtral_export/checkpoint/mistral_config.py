"""From Mistral's `params.json` to a ModelConfig. Specification sections 1.1 and 4."""

from __future__ import annotations

from pathlib import Path

from pixtral_export.checkpoint.config_file import (
    MAX_POSITION,
    MISTRAL_3,
    MOST_LAYERS,
    VISION_DEFAULTS,
    Section,
    checked,
    image_tokens,
    read_json,
    vision_config,
)
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig

MISTRAL_CONFIG = "params.json"


def read_mistral_config(file: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read `params.json`. Returns the configuration and warnings. Raises CheckpointError."""
    root = Section(file, read_json(file), {})
    root.not_quantized()
    encoder = root.section("vision_encoder", VISION_DEFAULTS)
    encoder.only("spatial_merge_size", None, 1, kind=MISTRAL_3)
    encoder.only("mm_projector_id", None, "", kind=MISTRAL_3)
    encoder.only("add_pre_mm_projector_layer_norm", None, False, kind=MISTRAL_3)
    for key in ("yarn", "rope_scaling", "llama_4_scaling", "sliding_window"):
        root.only(key, None)
    root.only("moe", None, kind="a mixture of experts")
    root.only("tied_embeddings", None, False)
    dim, heads = root.integer("dim"), root.integer("n_heads")
    positions = [root.integer(key, MAX_POSITION) for key in ("max_position_embeddings", "max_seq_len")]
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
        max_position=min(*positions, MAX_POSITION),
    )
    tokens, warnings = image_tokens(encoder, "image_token_id")
    vision = vision_config(encoder, encoder.number("rope_theta"))
    return checked(ModelConfig(vision, decoder, tokens, encoder.boolean("adapter_bias", True)), file), warnings
