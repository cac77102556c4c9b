"""From a checkpoint's `params.json` (Mistral) or `config.json` (Hugging Face) to a ModelConfig, and its tokenizer file.

Keys that a file leaves out take the defaults of the program that wrote it: mistral-inference's for params.json, the
configuration classes of transformers for config.json. What the graphs do not implement is refused by its key and value,
so that a relative of Pixtral-12B never turns into a bundle that answers nonsense. Specification sections 1.1 and 4.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.config import DecoderConfig, ImageTokens, ModelConfig, VisionConfig
from pixtral_runtime.errors import InputError

MISTRAL_CONFIG = "params.json"
HF_CONFIG = "config.json"
TOKENIZER = "tekken.json"
PACKAGED_TOKENIZER = "tekken_240911.json"  # Pixtral-12B's own file, part of every mistral-common release
PACKAGED_VOCABULARY = 131_072
MAX_POSITION = 131_072  # Hugging Face files say 1,024,000, which the model was not trained for
SUPPORTED_MODEL = "mistralai/Pixtral-12B-2409"
SUPPORTED_HINT = f"use {SUPPORTED_MODEL}: other members of its family are not supported yet"
ORIGINAL_HINT = f"use the original bfloat16 weights, such as {SUPPORTED_MODEL}; quantize after the export"
DOWNLOAD_HINT = f"download the checkpoint again: hf download {SUPPORTED_MODEL} --local-dir FOLDER"

VISION_DEFAULTS = {"num_channels": 3, "rope_theta": 1e4}
HF_VISION_DEFAULTS = VISION_DEFAULTS | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
}  # fmt: skip
HF_TEXT_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
}  # fmt: skip
HF_DEFAULTS = {
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip


@dataclass(frozen=True)
class _Section:
    """One object of a configuration file. Errors name a key by its whole path: `text_config.hidden_size`."""

    file: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str) -> Any:
        return self.values.get(key, self.defaults.get(key))

    def shown(self, key: str) -> str:
        """The key and its value, as an error quotes them."""
        absent = "" if key in self.values else " (absent, so the default)"
        return f"{self.prefix}{key} = {json.dumps(self.get(key))}{absent}"

    def section(self, key: str, defaults: Mapping[str, Any]) -> _Section:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.file} has no '{self.prefix}{key}': not a Pixtral model", SUPPORTED_HINT)
        if not isinstance(value, dict):
            raise self._unusable(key, "an object")
        return _Section(self.file, value, defaults, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._unusable(key, f"a whole number from {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._unusable(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self._unusable(key, "true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a value that asks for something the graphs do not implement. None stands for an absent key."""
        if self.get(key) not in allowed:
            expected = " or ".join("null" if value is None else json.dumps(value) for value in allowed)
            raise InputError(f"{self.file}: {self.shown(key)} is not implemented, only {expected} is", SUPPORTED_HINT)

    def not_quantized(self, key: str) -> None:
        value = self.get(key)
        if value:
            method = value.get("quant_method", key) if isinstance(value, dict) else value
            raise InputError(
                f"{self.file}: '{key}' says that the weights are already quantized ({method})", ORIGINAL_HINT
            )

    def _unusable(self, key: str, expected: str) -> InputError:
        seen = f"is {json.dumps(self.get(key))}" if self.get(key) is not None else "is absent"
        return InputError(f"{self.file}: '{self.prefix}{key}' {seen}, expected {expected}", DOWNLOAD_HINT)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", DOWNLOAD_HINT) from error
    except ValueError as error:
        raise InputError(f"{path} is broken JSON: {error}", DOWNLOAD_HINT) from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a JSON {type(data).__name__}, expected an object", DOWNLOAD_HINT)
    return data


def read_mistral_config(file: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read `params.json`. Returns the configuration and warnings. Raises InputError."""
    root = _Section(file, read_json(file), {})
    root.not_quantized("quantization")
    encoder = root.section("vision_encoder", VISION_DEFAULTS)
    for key in ("yarn", "rope_scaling", "llama_4_scaling", "sliding_window", "moe"):
        root.only(key, None)
    root.only("tied_embeddings", None, False)
    encoder.only("spatial_merge_size", None, 1)
    encoder.only("mm_projector_id", None, "")
    encoder.only("add_pre_mm_projector_layer_norm", None, False)
    dim, heads = root.integer("dim"), root.integer("n_heads")
    positions = [root.integer(key, MAX_POSITION) for key in ("max_position_embeddings", "max_seq_len")]
    decoder = DecoderConfig(
        dim=dim,
        n_layers=root.integer("n_layers"),
        head_dim=root.integer("head_dim", dim // heads),
        hidden_dim=root.integer("hidden_dim"),
        n_heads=heads,
        n_kv_heads=root.integer("n_kv_heads"),
        vocab_size=root.integer("vocab_size"),
        rope_theta=root.number("rope_theta"),
        norm_eps=root.number("norm_eps", 1e-5),
        max_position=min(*positions, MAX_POSITION),
    )
    tokens, warnings = _image_tokens(encoder, "image_token_id")
    vision = _vision_config(encoder, encoder.number("rope_theta"))
    return _checked(ModelConfig(vision, decoder, tokens, encoder.boolean("adapter_bias", True)), file), warnings


def read_hf_config(file: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read a Llava `config.json`. Returns the configuration and warnings. Raises InputError."""
    root = _Section(file, read_json(file), HF_DEFAULTS)
    root.only("model_type", "llava")
    root.not_quantized("quantization_config")
    text, encoder = root.section("text_config", HF_TEXT_DEFAULTS), root.section("vision_config", HF_VISION_DEFAULTS)
    text.only("model_type", "mistral")
    encoder.only("model_type", "pixtral")
    root.only("vision_feature_layer", -1)
    root.only("vision_feature_select_strategy", "full")
    root.only("projector_hidden_act", "gelu")
    root.only("spatial_merge_size", None, 1)
    root.only("tie_word_embeddings", None, False)
    text.only("tie_word_embeddings", None, False)
    text.only("sliding_window", None)
    text.only("hidden_act", "silu")
    dim, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    decoder = DecoderConfig(
        dim=dim,
        n_layers=text.integer("num_hidden_layers"),
        head_dim=text.integer("head_dim", dim // heads),
        hidden_dim=text.integer("intermediate_size"),
        n_heads=heads,
        n_kv_heads=text.integer("num_key_value_heads", heads),
        vocab_size=text.integer("vocab_size"),
        rope_theta=_hf_rope_theta(text, "default"),
        norm_eps=text.number("rms_norm_eps"),
        max_position=min(text.integer("max_position_embeddings"), MAX_POSITION),
    )
    vision = _vision_config(encoder, _hf_rope_theta(encoder, "axial", "default"))
    image_key = "image_token_id" if "image_token_id" in root.values else "image_token_index"
    tokens, warnings = _image_tokens(root, image_key)
    if encoder.get("hidden_act") != "silu":
        warnings += (
            f"{file.name}: {encoder.shown('hidden_act')}, a known mistake of early conversions; "
            "SiLU is used, which the model was trained with",
        )
    bias = root.boolean("multimodal_projector_bias", True)
    return _checked(ModelConfig(vision, decoder, tokens, bias), file), warnings


def find_tokenizer(folder: Path, config: ModelConfig) -> tuple[Path, tuple[str, ...]]:
    """The tekken.json of a checkpoint, or mistral-common's copy of Pixtral's. Raises InputError where neither fits."""
    path = folder / TOKENIZER
    vocabulary = config.decoder.vocab_size
    if not path.is_file():
        path = Path(str(importlib.resources.files("mistral_common").joinpath("data", PACKAGED_TOKENIZER)))
        if vocabulary != PACKAGED_VOCABULARY or not path.is_file():
            raise InputError(
                f"{folder} has no {TOKENIZER}, and none is known for a vocabulary of {vocabulary} tokens",
                f"put the model's {TOKENIZER} into {folder}",
            )
        message = f"{folder} has no {TOKENIZER}; mistral-common's copy of Pixtral-12B's is used ({PACKAGED_TOKENIZER})"
        return path, (message,)
    data = read_json(path)
    header = data.get("config")
    size = header.get("default_vocab_size") if isinstance(header, dict) else None
    if not isinstance(size, int):
        raise InputError(f"{path} has no config.default_vocab_size: it is no tekken tokenizer", DOWNLOAD_HINT)
    if size > vocabulary:
        raise InputError(
            f"{path} has {size} tokens, the model only {vocabulary}: they do not belong together",
            f"put the {TOKENIZER} that came with the weights into {folder}",
        )
    _check_image_tokens(path, data, config.image_tokens)
    return path, ()


def _check_image_tokens(path: Path, tokenizer: Mapping[str, Any], expected: ImageTokens) -> None:
    """A prompt made with other image tokens than the model's would be answered without a look at the image."""
    listed = tokenizer.get("special_tokens")
    if not listed:  # older files leave the list to mistral-common, where it holds ImageTokens' own defaults
        seen = ImageTokens()
    else:
        ids = {token.get("token_str"): token.get("rank") for token in listed}
        seen = ImageTokens(ids.get("[IMG]", -1), ids.get("[IMG_BREAK]", -1), ids.get("[IMG_END]", -1))
    if seen != expected:
        raise InputError(
            f"{path} gives [IMG], [IMG_BREAK], [IMG_END] the ids {seen.image}, {seen.image_break}, {seen.image_end}; "
            f"the model's configuration {expected.image}, {expected.image_break}, {expected.image_end}",
            f"put the {TOKENIZER} that came with the weights into {path.parent}, or name the ids in its configuration",
        )


def _vision_config(encoder: _Section, rope_theta: float) -> VisionConfig:
    hidden, heads = encoder.integer("hidden_size"), encoder.integer("num_attention_heads")
    if hidden % heads:
        raise InputError(
            f"{encoder.file}: {encoder.shown('hidden_size')} does not divide into {heads} heads", DOWNLOAD_HINT
        )
    encoder.only("head_dim", None, hidden // heads)
    return VisionConfig(
        hidden_size=hidden,
        num_hidden_layers=encoder.integer("num_hidden_layers"),
        num_attention_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=encoder.integer("intermediate_size"),
        patch_size=encoder.integer("patch_size"),
        image_size=encoder.integer("image_size"),
        rope_theta=rope_theta,
        num_channels=encoder.integer("num_channels"),
    )


def _image_tokens(section: _Section, image_key: str) -> tuple[ImageTokens, tuple[str, ...]]:
    """The ids and a warning on those assumed: the first params.json and every config.json leave two of them out."""
    default = ImageTokens()
    keys = {"image_break_token_id": default.image_break, "image_end_token_id": default.image_end}
    assumed = [f"{key} = {value}" for key, value in keys.items() if section.get(key) is None]
    ids = [section.integer(key, value, least=0) for key, value in keys.items()]
    tokens = ImageTokens(section.integer(image_key, least=0), *ids)
    return tokens, (f"{section.file.name} leaves ids out, assumed: {', '.join(assumed)}",) if assumed else ()


def _hf_rope_theta(section: _Section, *types: str) -> float:
    """Rotary base: its own key up to transformers 4, within `rope_parameters` from transformers 5."""
    section.only("rope_scaling", None)
    if section.get("rope_parameters") is None:
        return section.number("rope_theta")
    rope = section.section("rope_parameters", {"rope_type": types[0], "rope_theta": section.get("rope_theta")})
    rope.only("rope_type", *types)
    return rope.number("rope_theta")


def _checked(config: ModelConfig, file: Path) -> ModelConfig:
    """What shapes cannot show: how heads are grouped and split, and token ids within the vocabulary."""
    decoder, vision, tokens = config.decoder, config.vision, config.image_tokens
    ids = (tokens.image, tokens.image_break, tokens.image_end)
    heads = f"{decoder.n_heads} query heads cannot share {decoder.n_kv_heads} kv heads evenly"
    right = {
        heads: decoder.n_heads % decoder.n_kv_heads == 0,
        f"head_dim {decoder.head_dim} is odd": decoder.head_dim % 2 == 0,
        f"the vision encoder's head_dim {vision.head_dim} is no multiple of 4": vision.head_dim % 4 == 0,
        f"image_size {vision.image_size} is less than patch_size {vision.patch_size}": vision.max_grid > 0,
        f"image token ids {ids} are not three different ones": len(set(ids)) == len(ids),
        f"image token ids {ids} are not all below vocab_size {decoder.vocab_size}": max(ids) < decoder.vocab_size,
    }
    for message, holds in right.items():
        if not holds:
            raise InputError(f"{file}: {message}", SUPPORTED_HINT)
    return config
