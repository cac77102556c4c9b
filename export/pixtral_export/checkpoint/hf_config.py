"""From a Hugging Face `config.json` to a ModelConfig. Specification sections 1.1 and 4."""

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
from pixtral_export.model.transformer import ACTIVATIONS
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig
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

OTHER_MODELS = {"mistral3": MISTRAL_3, "mistral": "a model for text alone", "voxtral": "a model for speech"}

HF_DEFAULTS = {
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip


def read_hf_config(file: Path, *, keep_activations: bool = False) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read a Llava `config.json`. Returns the configuration and warnings. Raises CheckpointError.

    Feed-forwards have SiLU, as in every published Pixtral, unless `keep_activations` says that a GELU in the file is
    meant.
    """
    root = Section(file, read_json(file), HF_DEFAULTS)
    root.only("model_type", "llava", kind=OTHER_MODELS.get(str(root.get("model_type")), ""))
    root.not_quantized()
    text, encoder = root.section("text_config", HF_TEXT_DEFAULTS), root.section("vision_config", HF_VISION_DEFAULTS)
    text.not_quantized()
    encoder.not_quantized()
    text.only("model_type", "mistral")
    encoder.only("model_type", "pixtral")
    root.only("vision_feature_layer", -1)
    root.only("vision_feature_select_strategy", "full")
    root.only("projector_hidden_act", "gelu")
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
    decoder = DecoderConfig(
        dim=dim,
        n_layers=text.integer("num_hidden_layers", most=MOST_LAYERS),
        head_dim=text.integer("head_dim", dim // heads),
        hidden_dim=text.integer("intermediate_size"),
        n_heads=heads,
        n_kv_heads=text.integer("num_key_value_heads", heads),
        vocab_size=text.integer("vocab_size"),
        rope_theta=_hf_rope_theta(text, "default"),
        norm_eps=text.number("rms_norm_eps"),
        max_position=min(text.integer("max_position_embeddings"), MAX_POSITION),
        hidden_act=text.get("hidden_act"),
    )
    hidden_act = encoder.get("hidden_act") if keep_activations else "silu"
    vision = vision_config(encoder, _hf_rope_theta(encoder, "axial", "default"), hidden_act)
    image_key = "image_token_id" if "image_token_id" in root.values else "image_token_index"
    tokens, warnings = image_tokens(root, image_key)
    if encoder.get("hidden_act") != hidden_act:
        warnings += (
            f"{file.name}: {encoder.shown('hidden_act')}, a known mistake of early conversions; "
            "SiLU is used, which the model was trained with (or keep activations)",
        )
    bias = root.boolean("multimodal_projector_bias", True)
    return checked(ModelConfig(vision, decoder, tokens, bias), file), warnings


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
