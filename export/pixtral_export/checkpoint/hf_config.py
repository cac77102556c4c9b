"""From a Hugging Face `config.json` to a ModelConfig. Specification sections 1.1 and 4."""

from __future__ import annotations

import math
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
from pixtral_export.model.transformer import ACTIVATIONS
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, QueryScale, Yarn
from pixtral_runtime.errors import CheckpointError, Option

HF_CONFIG = "config.json"

HF_VISION_DEFAULTS = VISION_DEFAULTS | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
}  # fmt: skip

HF_TEXT_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
}  # fmt: skip

YARN_KEYS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "max_position_embeddings",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor",
    "llama_4_scaling_beta",
)  # fmt: skip

OTHER_MODELS = {"mistral": "a model for text alone", "voxtral": "a model for speech"}

HF_DEFAULTS = {
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip
MISTRAL_3_DEFAULTS = {
    "projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "spatial_merge_size": 2, "multimodal_projector_bias": False, "image_token_index": 10, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL_3_VISION_DEFAULTS = HF_VISION_DEFAULTS | {"patch_size": 14, "image_size": 1540}
MINISTRAL_3_TEXT_DEFAULTS = HF_TEXT_DEFAULTS | {
    "vocab_size": 131_072, "num_hidden_layers": 34, "head_dim": 128, "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip


def read_hf_config(file: Path, *, keep_activations: bool = False) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read a Llava or Mistral 3 `config.json`. Returns the configuration and warnings. Raises CheckpointError.

    Feed-forwards have SiLU, as in every published Pixtral, unless `keep_activations` says that a GELU in the file is
    meant.
    """
    values = read_json(file)
    is_mistral_3 = values.get("model_type") == "mistral3"
    root = Section(file, values, MISTRAL_3_DEFAULTS if is_mistral_3 else HF_DEFAULTS)
    root.only("model_type", "llava", "mistral3", kind=OTHER_MODELS.get(str(root.get("model_type")), ""))
    text, encoder = root.section("text_config", HF_TEXT_DEFAULTS), root.section("vision_config", HF_VISION_DEFAULTS)
    if is_mistral_3:
        encoder = root.section("vision_config", MISTRAL_3_VISION_DEFAULTS)
        if text.get("model_type") == "ministral3":
            text = root.section("text_config", MINISTRAL_3_TEXT_DEFAULTS)
    text.not_quantized()
    encoder.not_quantized()
    text.only("model_type", "mistral", *(("ministral3",) if is_mistral_3 else ()))
    encoder.only("model_type", "pixtral")
    root.only("vision_feature_layer", -1)
    root.only("vision_feature_select_strategy", "full")
    root.only("projector_hidden_act", "gelu")
    merge = root.integer("spatial_merge_size", 1) if is_mistral_3 else 1
    if not is_mistral_3:
        root.only("spatial_merge_size", None, 1)
        root.only("tie_word_embeddings", None, False)
        text.only("tie_word_embeddings", None, False)
    text.only("sliding_window", None)
    text.only("hidden_act", *ACTIVATIONS)
    encoder.only("hidden_act", *ACTIVATIONS)
    if text.get("hidden_act") != "silu" and not keep_activations:
        raise CheckpointError(
            f"{file}: {text.shown('hidden_act')}, and Pixtral's decoder has SiLU",
            Option("keep_activations", note="if it was trained with this one"),
        )
    dim, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    rope_theta, yarn, scale = _hf_rope(text) if is_mistral_3 else (_hf_rope_theta(text, "default"), None, None)
    decoder = DecoderConfig(
        dim=dim,
        n_layers=text.integer("num_hidden_layers", most=MOST_LAYERS),
        head_dim=text.integer("head_dim", dim // heads),
        hidden_dim=text.integer("intermediate_size"),
        n_heads=heads,
        n_kv_heads=text.integer("num_key_value_heads", heads),
        vocab_size=text.integer("vocab_size"),
        rope_theta=rope_theta,
        norm_eps=text.number("rms_norm_eps"),
        max_position=min(text.integer("max_position_embeddings"), MAX_POSITION if yarn is None else yarn.max_position),
        hidden_act=text.get("hidden_act"),
        yarn=yarn,
        query_scale=scale,
        tied_embeddings=is_mistral_3 and bool(root.boolean("tie_word_embeddings", True)),
    )
    hidden_act = encoder.get("hidden_act") if keep_activations else "silu"
    vision = vision_config(encoder, _hf_rope_theta(encoder, "axial", "default"), hidden_act, merge)
    image_key = "image_token_id" if "image_token_id" in root.values else "image_token_index"
    tokens, warnings = image_tokens(root, image_key)
    if encoder.get("hidden_act") != hidden_act:
        warnings += (
            f"{file.name}: {encoder.shown('hidden_act')}, a known mistake of early conversions; "
            "SiLU is used, which the model was trained with (or keep activations)",
        )
    bias = root.boolean("multimodal_projector_bias", True)
    return checked(ModelConfig(vision, decoder, tokens, bias, adapter_norm=is_mistral_3), file), warnings


def _hf_rope(text: Section) -> tuple[float, Yarn | None, QueryScale | None]:
    """Rotary base, stretched frequencies and scaled queries, as transformers reads them (modeling_rope_utils)."""
    own_base = {"rope_theta": text.values.get("rope_theta")}
    rope = text if text.get("rope_parameters") is None else text.section("rope_parameters", own_base)
    if rope is text or (rope.get("rope_type") or rope.get("type") or "default") == "default":
        return _hf_rope_theta(text, "default"), None, None
    rope.known(*YARN_KEYS)
    for key in ("rope_type", "type"):
        rope.only(key, "yarn", None)
    rope.only("truncate", None, True)
    rope.only("partial_rotary_factor", None, 1)
    length, factor = rope.integer("original_max_position_embeddings"), rope.number("factor")
    own = None if rope.get("attention_factor") is None else rope.number("attention_factor")
    weights = [rope.number(key) if rope.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    if own is None:
        above, below = weights if all(weights) else (1, 0)
        own = _growth(factor, above) / _growth(factor, below)
    yarn = Yarn(factor, length, rope.number("beta_fast", 32), rope.number("beta_slow", 1), own)
    is_scaled = rope.get("llama_4_scaling_beta") not in (None, 0)
    scale = QueryScale(rope.number("llama_4_scaling_beta"), length) if is_scaled else None
    return rope.number("rope_theta"), yarn, scale


def _growth(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _hf_rope_theta(section: Section, *types: str) -> float:
    """Rotary base: its own key up to transformers 4, within `rope_parameters` from transformers 5.

    A base that `rope_parameters` leaves out is not the class's default: every Pixtral has another one in its decoder.
    """
    section.only("rope_scaling", None)
    section.only("partial_rotary_factor", None, 1)
    if section.get("rope_parameters") is None:
        return section.number("rope_theta")
    own = {"rope_type": types[0], "rope_theta": section.values.get("rope_theta")}
    rope = section.section("rope_parameters", own)
    for key in ("rope_type", "type"):  # the latter is the older word
        rope.only(key, *types, *(() if key in own else (None,)))
    rope.only("partial_rotary_factor", None, 1)
    for key, value in rope.values.items():
        if isinstance(value, dict):  # a base for each kind of layer
            rope.only(key, None)
    return rope.number("rope_theta")
