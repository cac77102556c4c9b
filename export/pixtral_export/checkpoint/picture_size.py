"""How a checkpoint's own programs scale pictures: files beside the configuration may say less than it.

mistral-common obeys tekken.json, transformers preprocessor_config.json, and params.json has a key for it beside the
encoder's own size. A bundle scales pictures as they do, so that its answers are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_export.checkpoint.config_file import Section, read_json
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG
from pixtral_export.checkpoint.tokenizer import TokenizerFile
from pixtral_runtime.bundle.config import VisionConfig
from pixtral_runtime.errors import CheckpointError
from pixtral_runtime.inputs.preprocess import CHANNEL_DEVIATIONS, CHANNEL_MEANS

PREPROCESSOR_CONFIG, PROCESSOR_CONFIG = "preprocessor_config.json", "processor_config.json"
SIDE, PATCH = "image size", "patch size"

Said = tuple[Path, str, str, int | None]
"""A file, its key, what that is (SIDE or PATCH) and the pixels, None where it leaves the key out."""


def picture_side(
    folder: Path, is_mistral: bool, tokenizer: TokenizerFile, vision: VisionConfig
) -> tuple[int, tuple[str, ...]]:
    """The longest side in pixels that pictures are scaled to, and a warning where it is less than the encoder's.

    Raises CheckpointError where a file asks for pictures that the encoder cannot read.
    """
    side, warnings = vision.image_size, []
    expected = {SIDE: vision.image_size, PATCH: vision.token_edge}
    for file, key, what, seen in _sources(folder, is_mistral, tokenizer, vision.spatial_merge_size):
        if seen is None or seen == expected[what]:
            continue
        if what == PATCH or not vision.token_edge <= seen <= vision.image_size:
            raise CheckpointError(
                f"{file} says {key} = {seen}, the model's configuration a {what} of {expected[what]}: "
                "they do not belong together",
                f"put the {file.name} that came with the weights into {folder}",
            )
        warnings.append(
            f"{file.name} has pictures scaled to {key} = {seen}, which is obeyed; "
            f"the vision encoder could take {vision.image_size} px"
        )
        side = min(side, seen)
    return side, tuple(warnings)


def _sources(folder: Path, is_mistral: bool, tokenizer: TokenizerFile, merge: int) -> Iterator[Said]:
    if (image := tokenizer.image) is not None:
        yield tokenizer.path, "image.max_image_size", SIDE, image.max_image_size
        edge = image.image_patch_size * image.spatial_merge_size  # pixels of a token's edge
        yield tokenizer.path, "image.image_patch_size * image.spatial_merge_size", PATCH, edge
    if is_mistral:
        file = folder / MISTRAL_CONFIG
        encoder = Section(file, read_json(file), {}).section("vision_encoder", {})
        yield file, "vision_encoder.max_image_size", SIDE, _pixels(encoder, "max_image_size")
    elif (found := _image_processor(folder)) is not None:
        found.only("image_mean", None, list(CHANNEL_MEANS))
        found.only("image_std", None, list(CHANNEL_DEVIATIONS))
        yield found.file, f"{found.prefix}size.longest_edge", SIDE, _pixels(found, "size", "longest_edge")
        patch, merge = _pixels(found, "patch_size", "height"), _pixels(found, "spatial_merge_size") or merge
        yield found.file, f"{found.prefix}patch_size", PATCH, patch and patch * merge


def _image_processor(folder: Path) -> Section | None:
    """Where transformers looks: within the file of the whole processor, else in one of its own."""
    file = folder / PROCESSOR_CONFIG
    if file.is_file():
        root = Section(file, read_json(file), {})
        if root.get("image_processor") is not None:
            return root.section("image_processor", {})
    file = folder / PREPROCESSOR_CONFIG
    return Section(file, read_json(file), {}) if file.is_file() else None


def _pixels(section: Section, key: str, part: str = "") -> int | None:
    """A size that stands under a key, or as a part of an object there."""
    if part and isinstance(section.get(key), dict):
        return _pixels(section.section(key, {}), part)
    return None if section.get(key) is None else section.integer(key)
