"""What a checkpoint's `params.json` (Mistral) and `config.json` (Hugging Face) are read with.

Keys that a file leaves out take the defaults of the program that wrote it: mistral-inference's for params.json, the
configuration classes of transformers for config.json. What the graphs do not implement is refused by its key and value,
so that a relative of Pixtral-12B never turns into a bundle that answers nonsense. Specification sections 1.1 and 4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.config import ImageTokens, ModelConfig, VisionConfig
from pixtral_runtime.errors import CheckpointError

MODEL_CARD = "README.md"
BASE_MODEL = re.compile(r"^base_model:\s*(?:[-\[]\s*)?[\"']?(\w[\w.-]*/\w[\w.-]*)", re.MULTILINE)  # one, or a list
LARGEST = 1 << 24  # of every size; the largest published ones are context lengths of a million
LARGEST_NUMBER = 1e15
MOST_LAYERS = 1000
MOST_SHOWN = 200  # characters of a value
LISTED = 3  # names that an error lists of each kind
MAX_POSITION = 131_072  # Hugging Face files say 1,024,000, which the model was not trained for
SUPPORTED_MODEL = "mistralai/Pixtral-12B-2409"
SUPPORTED_HINT = f"use {SUPPORTED_MODEL}, Mistral-Small-3.1 or 3.2, Magistral-Small, Devstral-Small-2 or Ministral-3"
ORIGINAL_HINT = f"use the original bfloat16 weights, such as {SUPPORTED_MODEL}; quantize after the export"
DOWNLOAD_HINT = f"download the checkpoint again: hf download {SUPPORTED_MODEL} --local-dir FOLDER"

QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")  # Hugging Face; Mistral, MLX; older

VISION_DEFAULTS = {"num_channels": 3, "rope_theta": 1e4}


@dataclass(frozen=True)
class Section:
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
        return f"{self.prefix}{key} = {json.dumps(self.get(key))[:MOST_SHOWN]}{absent}"

    def section(self, key: str, defaults: Mapping[str, Any]) -> Section:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file} has no '{self.prefix}{key}': not a Pixtral model", SUPPORTED_HINT)
        if not isinstance(value, dict):
            raise self._unusable(key, "an object")
        return Section(self.file, value, defaults, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._unusable(key, f"a whole number from {least} to {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST_NUMBER:
            raise self._unusable(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self._unusable(key, "true or false")
        return value

    def known(self, *keys: str) -> None:
        """Refuse keys beside these: in an object that changes the mathematics each may."""
        for key in self.values:
            if key not in keys:
                self.only(key, None)

    def only(self, key: str, *allowed: Any, kind: str = "") -> None:
        """Refuse a value that asks for something the graphs do not implement. None stands for an absent key.

        `kind` is the sort of model that has other values, where that is known.
        """
        if self.get(key) not in allowed:
            expected = " or ".join("null" if value is None else json.dumps(value) for value in allowed)
            named = f" (this is {kind})" if kind else ""
            raise CheckpointError(
                f"{self.file}: {self.shown(key)} is not implemented, only {expected} is{named}", SUPPORTED_HINT
            )

    def not_quantized(self) -> None:
        """Refuse what says that the weights are quantized, in any of the words that its writers have for it."""
        for key in QUANTIZATION_KEYS:
            if value := self.get(key):
                method = value.get("quant_method", key) if isinstance(value, dict) else value
                raise CheckpointError(
                    f"{self.file}: '{self.prefix}{key}' says that the weights are already quantized ({method})",
                    original_hint(self.file.parent),
                )

    def _unusable(self, key: str, expected: str) -> CheckpointError:
        seen = f"is {json.dumps(self.get(key))[:MOST_SHOWN]}" if self.get(key) is not None else "is absent"
        return CheckpointError(f"{self.file}: '{self.prefix}{key}' {seen}, expected {expected}", DOWNLOAD_HINT)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", DOWNLOAD_HINT) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is broken JSON: {error}", DOWNLOAD_HINT) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object", DOWNLOAD_HINT)
    return data


def original_hint(folder: Path) -> str:
    """Where to find the weights that a quantized copy was made from: model cards name them as `base_model`."""
    try:
        card = (folder / MODEL_CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ORIGINAL_HINT
    base = BASE_MODEL.search(card)
    return f"use the original weights, pixtral export {base[1]}; quantize after the export" if base else ORIGINAL_HINT


def few(names: Sequence[str]) -> str:
    """The first names of many."""
    more = len(names) - LISTED
    return "; ".join(names[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def vision_config(encoder: Section, rope_theta: float, hidden_act: str = "silu", merge: int = 1) -> VisionConfig:
    hidden, heads = encoder.integer("hidden_size"), encoder.integer("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"{encoder.file}: {encoder.shown('hidden_size')} does not divide into {heads} heads", DOWNLOAD_HINT
        )
    encoder.only("head_dim", None, hidden // heads)
    return VisionConfig(
        hidden_size=hidden,
        num_hidden_layers=encoder.integer("num_hidden_layers", most=MOST_LAYERS),
        num_attention_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=encoder.integer("intermediate_size"),
        patch_size=encoder.integer("patch_size"),
        image_size=encoder.integer("image_size"),
        rope_theta=rope_theta,
        num_channels=encoder.integer("num_channels"),
        hidden_act=hidden_act,
        spatial_merge_size=merge,
    )


def image_tokens(section: Section, image_key: str) -> tuple[ImageTokens, tuple[str, ...]]:
    """The ids and a warning on those assumed: the first params.json and every config.json leave two of them out."""
    default = ImageTokens()
    keys = {"image_break_token_id": default.image_break, "image_end_token_id": default.image_end}
    assumed = [f"{key} = {value}" for key, value in keys.items() if section.get(key) is None]
    ids = [section.integer(key, value, least=0) for key, value in keys.items()]
    tokens = ImageTokens(section.integer(image_key, least=0), *ids)
    return tokens, (f"{section.file.name} leaves ids out, assumed: {', '.join(assumed)}",) if assumed else ()


def checked(config: ModelConfig, file: Path) -> ModelConfig:
    """The configuration. Raises CheckpointError where it is that of no model, or of one that the graphs are not for."""
    vision = config.vision
    right = {
        f"image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}, so the largest picture "
        "would have patches that the encoder has no positions for": vision.image_size % vision.patch_size == 0,
        f"image_size {vision.image_size} is no multiple of {vision.token_edge}, the edge of spatial_merge_size "
        f"{vision.spatial_merge_size} patches": vision.image_size % vision.token_edge == 0,
        f"num_channels {vision.num_channels}, and pictures have 3": vision.num_channels == 3,
    }
    for fault in (*config.faults(), *(message for message, holds in right.items() if not holds)):
        raise CheckpointError(f"{file}: {fault}", SUPPORTED_HINT)
    return config
