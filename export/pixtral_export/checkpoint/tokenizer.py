"""A checkpoint's tokenizer file, checked against its configuration."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT, read_json
from pixtral_runtime.bundle.config import ImageTokens, ModelConfig
from pixtral_runtime.errors import CheckpointError

TOKENIZER = "tekken.json"
PACKAGED_TOKENIZER = "tekken_240911.json"  # Pixtral-12B's own file, part of every mistral-common release
PACKAGED_VOCABULARY = 131_072


def find_tokenizer(folder: Path, config: ModelConfig) -> tuple[Path, tuple[str, ...]]:
    """The tekken.json of a checkpoint, or mistral-common's copy. Raises CheckpointError where neither fits."""
    path = folder / TOKENIZER
    vocabulary = config.decoder.vocab_size
    if not path.is_file():
        path = Path(str(importlib.resources.files("mistral_common").joinpath("data", PACKAGED_TOKENIZER)))
        if vocabulary != PACKAGED_VOCABULARY or not path.is_file():
            raise CheckpointError(
                f"{folder} has no {TOKENIZER}, and none is known for a vocabulary of {vocabulary} tokens",
                f"put the model's {TOKENIZER} into {folder}",
            )
        message = f"{folder} has no {TOKENIZER}; mistral-common's copy of Pixtral-12B's is used ({PACKAGED_TOKENIZER})"
        return path, (message,)
    data = read_json(path)
    header = data.get("config")
    size = header.get("default_vocab_size") if isinstance(header, dict) else None
    if not isinstance(size, int):
        raise CheckpointError(f"{path} has no config.default_vocab_size: it is no tekken tokenizer", DOWNLOAD_HINT)
    if size > vocabulary:
        raise CheckpointError(
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
        raise CheckpointError(
            f"{path} gives [IMG], [IMG_BREAK], [IMG_END] the ids {seen.image}, {seen.image_break}, {seen.image_end}; "
            f"the model's configuration {expected.image}, {expected.image_break}, {expected.image_end}",
            f"put the {TOKENIZER} that came with the weights into {path.parent}, or name the ids in its configuration",
        )
