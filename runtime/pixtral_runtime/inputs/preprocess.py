"""From an RGB picture to the vision encoder's input: scale to a grid of patches, then normalize.

In: a PIL picture in mode RGB. Out: float32 (3, rows * patch, columns * patch). One patch becomes one image token, and
each row of patches ends with one more (specification section 2.3).

Two modes exist because the two published implementations differ in pixels and, for some 3 % of the pictures that must
shrink, in the grid (specification section 2.2):

| mode | scaled size | interpolation | overshoot |
| --- | --- | --- | --- |
| `mistral` | rounded | OpenCV cubic on floats, not antialiased | kept |
| `hf` | floored | Pillow bicubic on 8-bit values, antialiased | clipped, rounded |

`mistral` is the reference, and calls mistral_common itself. `hf` is what transformers 5.23 computes, for comparing with
outputs made there. Both then go up to whole patches in the same single resize, so nothing is padded. Where one side
would scale to less than a pixel, both keep one pixel, hence one row of patches; transformers fails there.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from math import floor
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import InputError, Option, SettingError

PREPROCESS_MODES = ("mistral", "hf")

CHANNEL_MEANS = (0.48145466, 0.4578275, 0.40821073)  # RGB; specification section 2.1, step 7
CHANNEL_DEVIATIONS = (0.26862954, 0.26130258, 0.27577711)

OWN_BUDGET = "image_tokens"  # in a picture's `info`
MIN_IMAGE_TOKENS = 2  # a single patch and the end of its row


def token_count(columns: int, rows: int) -> int:
    """Tokens that a grid takes in the prompt: its patches, row breaks and the end."""
    return (columns + 1) * rows


def check_mode(mode: str) -> None:
    """Raises SettingError for a mode that there is not."""
    if mode not in PREPROCESS_MODES:
        raise SettingError(f"unknown preprocess mode '{mode}'", Option("preprocess", tuple(PREPROCESS_MODES)))


@dataclass(frozen=True)
class Preprocess:
    """Settings of the preprocessing; call it with a picture. Raises SettingError on settings that cannot work."""

    patch_size: int  # pixels
    max_side: int  # longest edge in pixels; larger pictures shrink to it
    mode: str = "mistral"
    image_tokens: int | None = None  # budget: shrink further until `token_count` of the grid is within it

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.patch_size < 1:
            raise SettingError(f"patch size {self.patch_size}, expected at least 1", "use the patch size of the model")
        if self.max_side < self.patch_size:
            raise SettingError(
                f"longest image side {self.max_side} px is less than one patch of {self.patch_size} px",
                Option("max_image_side", self.patch_size, "or more"),
            )
        if self.image_tokens is not None and self.image_tokens < MIN_IMAGE_TOKENS:
            raise SettingError(
                f"budget of {self.image_tokens} tokens per image, the smallest image takes {MIN_IMAGE_TOKENS}",
                Option("image_tokens", MIN_IMAGE_TOKENS, "or more"),
            )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of patches for a picture of this size in pixels.

        Within a budget, the largest side that fits is taken: the first one, counting down from the picture's own (or
        `max_side`). One always fits, as a side of one pixel is a single patch.
        """
        if self.image_tokens is None:
            return self._grid_within(self.max_side, width, height)
        budget = self.image_tokens
        sides = range(min(self.max_side, max(width, height)), 0, -1)
        grids = (self._grid_within(side, width, height) for side in sides)
        return next(grid for grid in grids if token_count(*grid) <= budget)

    def drawn_size(self, width: float, height: float) -> tuple[int, int]:
        """(width, height) in pixels at which to draw what has no pixels of its own, such as a page: its ratio counts.

        It is the largest of this ratio that the model sees, in whole patches, so what is drawn is not scaled later.
        """
        scale = self.max_side / max(width, height)
        columns, rows = self.grid(max(round(width * scale), 1), max(round(height * scale), 1))
        return columns * self.patch_size, rows * self.patch_size

    @property
    def largest_block(self) -> int:
        """The most tokens that any picture takes: a square one, unless the budget says less."""
        square = token_count(*self.grid(self.max_side, self.max_side))
        return square if self.image_tokens is None else min(square, self.image_tokens)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """The normalized pixels, (3, rows * patch, columns * patch)."""
        if image.mode != "RGB":
            raise InputError(f"preprocessing takes an RGB picture, got {image.mode}", "use decode_image(...).pixels")
        columns, rows = self.grid(*image.size)
        size = (columns * self.patch_size, rows * self.patch_size)
        if self.mode == "hf":
            return _hf_pixels(image, size)
        from mistral_common.tokens.tokenizers.image import transform_image

        return np.ascontiguousarray(transform_image(image, size), dtype=np.float32)

    def of(self, image: Image.Image) -> Preprocess:
        """These settings, with the picture's own budget where that is smaller."""
        own = image.info.get(OWN_BUDGET)
        is_smaller = own is not None and (self.image_tokens is None or own < self.image_tokens)
        return replace(self, image_tokens=own) if is_smaller else self

    def _grid_within(self, max_side: int, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) when the longest edge may have `max_side` pixels."""
        grid = _hf_grid if self.mode == "hf" else _mistral_grid
        return grid(self.patch_size, max_side, width, height)


class KeptPixels:
    """Preprocessed pixels of pictures that many prompts show, each for as long as its picture lives.

    Whoever puts a picture in changes it no more.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Image.Image], NDArray[np.float32]]] = {}  # pictures have no hash

    def put(self, image: Image.Image, pixels: NDArray[np.float32]) -> None:
        key = id(image)
        self._kept[key] = weakref.ref(image, lambda _: self._kept.pop(key, None)), pixels

    def get(self, image: Image.Image) -> NDArray[np.float32] | None:
        kept = self._kept.get(id(image))
        return None if kept is None or kept[0]() is not image else kept[1]


def _mistral_grid(patch_size: int, max_side: int, width: int, height: int) -> tuple[int, int]:
    from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs

    encoder = ImageEncoder(ImageConfig(patch_size, max_side), SpecialImageIDs(img=0, img_break=0, img_end=0))
    picture: Any = SimpleNamespace(size=(width, height))  # its size is all that is read, so spare the pixels
    return encoder._image_to_num_tokens(picture)


def _hf_grid(patch_size: int, max_side: int, width: int, height: int) -> tuple[int, int]:
    ratio = max(width / max_side, height / max_side)
    if ratio > 1:
        width, height = max(floor(width / ratio), 1), max(floor(height / ratio), 1)
    return (width - 1) // patch_size + 1, (height - 1) // patch_size + 1


def _hf_pixels(image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """Each step in the dtype that transformers uses, so that results agree to the last bit."""
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))  # (H, W, 3) uint8
    scaled = (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalized = (scaled - np.array(CHANNEL_MEANS, np.float32)) / np.array(CHANNEL_DEVIATIONS, np.float32)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))  # (3, H, W)


LOW_DETAIL_TOKENS = 272  # a picture of 256² pixels, in patches of 16


def see_within(image: Image.Image, image_tokens: int) -> Image.Image:
    """The same picture, of which at most so many tokens are to be seen, whatever the budget of others."""
    image.info[OWN_BUDGET] = image_tokens
    return image


def default_preprocess(
    bundle: Bundle, *, mode: str = "", max_side: int | None = None, image_tokens: int | None = None
) -> Preprocess:
    """A bundle's preprocessing with the user's changes. Raises SettingError where a side exceeds the bundle's limit."""
    limit = bundle.limits.max_image_side
    if max_side is not None and max_side > limit:
        raise SettingError(
            f"a longest image side of {max_side} px exceeds the bundle's limit of {limit}",
            Option("max_image_side", limit),
        )
    side = limit if max_side is None else max_side
    return Preprocess(bundle.model.vision.token_edge, side, mode or bundle.preprocess, image_tokens)
