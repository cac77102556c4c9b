"""Preprocessing: the same grids and pixels as mistral_common (mode `mistral`) and transformers (mode `hf`)."""

from __future__ import annotations

import csv
import importlib
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from numpy.typing import NDArray
from PIL import Image

from pixtral_runtime.errors import ImageError, InputError
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.preprocess import PREPROCESS_MODES, Preprocess, token_count

MISTRAL_ATOL = 1e-4  # seen 0: the same functions run
GOLDEN_RTOL = 1e-5  # seen 9e-7: a float32 sum over up to 3 million pixels
WHITE = (1.9303361, 2.0748837, 2.145897)  # specification section 2.1, step 7
BLACK = (-1.7922626, -1.7520971, -1.4802198)
NORMALIZED_ATOL = 1e-6  # seen 5e-7
IMG, BREAK, END = 10, 12, 13

# damaged pictures are read here too; pytest replaces the warning filters that the image module installs
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL\\.")

PIXTRAL = Preprocess(patch_size=16, max_side=1024)
PIXTRAL_HF = Preprocess(patch_size=16, max_side=1024, mode="hf")


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoder(patch_size: int, max_side: int) -> ImageEncoder:
    return ImageEncoder(ImageConfig(patch_size, max_side), SpecialImageIDs(img=IMG, img_break=BREAK, img_end=END))


def grid_of_tokens(tokens: list[int]) -> tuple[int, int]:
    """(columns, rows) of a block of image tokens, read off its breaks."""
    rows = tokens.count(BREAK) + tokens.count(END)
    return tokens.count(IMG) // rows, rows


def random_sizes(count: int, largest: int) -> list[tuple[int, int]]:
    generator = random.Random(2409)
    return [(generator.randint(1, largest), generator.randint(1, largest)) for _ in range(count)]


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((16, 16), (1, 1), 2),
        ((17, 16), (2, 1), 3),
        ((200, 300), (13, 19), 266),
        ((224, 224), (14, 14), 210),
        ((400, 300), (25, 19), 494),
        ((150, 600), (10, 38), 418),
        ((500, 500), (32, 32), 1056),
        ((512, 512), (32, 32), 1056),
        ((640, 480), (40, 30), 1230),
        ((1024, 1024), (64, 64), 4160),
        ((1920, 1080), (64, 36), 2340),
        ((2480, 3508), (46, 64), 3008),
        ((4000, 3000), (64, 48), 3120),
    ],
)
def test_grids_and_token_counts_are_those_of_the_specification(
    size: tuple[int, int], grid: tuple[int, int], tokens: int
) -> None:
    assert PIXTRAL.grid(*size) == grid
    assert token_count(*grid) == tokens


@pytest.mark.parametrize(
    ("size", "grid"),
    [((16, 16), (1, 1)), ((200, 300), (8, 11)), ((1024, 1024), (37, 37)), ((2480, 3508), (39, 55))],
)
def test_grids_of_the_mistral3_family_come_from_its_merged_patch(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert Preprocess(patch_size=28, max_side=1540).grid(*size) == grid


@pytest.mark.parametrize(
    ("size", "output_size", "golden"),
    [
        ((200, 311), (208, 320), 38949.726562),
        ((300, 212), (304, 224), 39848.566406),
        ((251, 1374), (192, 1024), 115051.507812),
        ((1475, 477), (1024, 336), 201340.125),
        ((1344, 1544), (896, 1024), 536907.0),
        ((2133, 3422), (640, 1024), 383505.0),
    ],
)
def test_grey_pictures_give_the_sums_of_mistral_commons_own_tests(
    size: tuple[int, int], output_size: tuple[int, int], golden: float
) -> None:
    pixels = PIXTRAL(Image.new("RGB", size, (128, 128, 128)))
    assert pixels.shape == (3, output_size[1], output_size[0])
    assert abs(float(pixels.sum())) == pytest.approx(golden, rel=GOLDEN_RTOL)


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
@pytest.mark.parametrize(("colour", "expected"), [("white", WHITE), ("black", BLACK)])
def test_white_and_black_have_the_specified_values(mode: str, colour: str, expected: tuple[float, ...]) -> None:
    pixels = Preprocess(16, 1024, mode)(Image.new("RGB", (33, 50), colour))
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert np.abs(pixels - np.reshape(expected, (3, 1, 1))).max() <= NORMALIZED_ATOL


def test_cubic_overshoot_is_kept_by_mistral_and_clipped_by_hf() -> None:
    black_or_white = noise(100, 100).convert("L").point(lambda level: 255 * (level > 127)).convert("RGB")
    mistral, hf = PIXTRAL(black_or_white), PIXTRAL_HF(black_or_white)
    for channel in range(3):
        assert mistral[channel].max() > WHITE[channel] + 0.1  # seen 1.4
        assert mistral[channel].min() < BLACK[channel] - 0.1
        assert hf[channel].max() == pytest.approx(WHITE[channel], abs=NORMALIZED_ATOL)
        assert hf[channel].min() == pytest.approx(BLACK[channel], abs=NORMALIZED_ATOL)


@pytest.mark.parametrize("width", [1041, 1119, 1147, 1209])
def test_rounding_and_flooring_give_another_grid_where_the_specification_says_so(width: int) -> None:
    mistral, hf = PIXTRAL.grid(width, 700), PIXTRAL_HF.grid(width, 700)
    assert mistral == (64, hf[1] + 1)
    if width == 1041:
        assert (mistral, hf) == ((64, 44), (64, 43))


def test_a_thousand_grids_equal_those_of_the_image_encoder() -> None:
    reference = encoder(16, 1024)
    for width, height in random_sizes(1000, 5000):
        expected = reference._image_to_num_tokens(Image.new("1", (width, height)))
        assert PIXTRAL.grid(width, height) == expected, (width, height)


@pytest.mark.parametrize("patch_size, max_side", [(16, 1024), (16, 128), (14, 98)])
def test_pixels_and_tokens_equal_those_of_the_image_encoder(patch_size: int, max_side: int) -> None:
    reference, preprocess = encoder(patch_size, max_side), Preprocess(patch_size, max_side)
    for size in random_sizes(40, 300):
        picture = noise(*size)
        expected = reference(ImageChunk(image=picture))
        pixels = preprocess(picture)
        assert preprocess.grid(*size) == grid_of_tokens(expected.tokens)
        assert token_count(*preprocess.grid(*size)) == len(expected.tokens)
        assert pixels.shape == expected.image.shape
        assert np.abs(pixels - expected.image).max() <= MISTRAL_ATOL


def hf_reference(picture: Image.Image, patch_size: int, max_side: int) -> NDArray[np.float32]:
    """Its image processor on the Pillow backend, which needs no torchvision."""
    processing = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    processor = processing.PixtralImageProcessorPil(
        patch_size={"height": patch_size, "width": patch_size}, size={"longest_edge": max_side}
    )
    pixels: NDArray[np.float32] = processor(picture, return_tensors="np")["pixel_values"][0]
    return pixels


def assert_equals_hf(picture: Image.Image, patch_size: int, max_side: int) -> None:
    expected = hf_reference(picture, patch_size, max_side)
    preprocess = Preprocess(patch_size, max_side, mode="hf")
    columns, rows = preprocess.grid(*picture.size)
    assert (rows * patch_size, columns * patch_size) == expected.shape[1:], picture.size
    assert np.array_equal(preprocess(picture), expected), picture.size  # to the last bit


@pytest.mark.parametrize("patch_size, max_side", [(16, 128), (28, 252)])
def test_hf_mode_equals_the_transformers_processor_on_small_pictures(patch_size: int, max_side: int) -> None:
    # narrower ones make transformers fail
    sizes = [size for size in random_sizes(30, 400) if max(size) <= max_side * min(size)]
    assert len(sizes) > 25
    for size in sizes:
        assert_equals_hf(noise(*size), patch_size, max_side)


@pytest.mark.parametrize("size", [(1041, 700), (700, 1147), (1920, 1080), (2480, 3508), (1000, 700), (1024, 1024)])
def test_hf_mode_equals_the_transformers_processor_at_pixtrals_own_size(size: tuple[int, int]) -> None:
    assert_equals_hf(noise(*size), 16, 1024)


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1), (32, 2048), (1, 5000), (5000, 1), (70_000, 3)])
def test_extreme_shapes_work_in_both_modes(mode: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(16, 1024, mode)
    columns, rows = preprocess.grid(*size)
    assert min(columns, rows) >= 1
    assert max(columns, rows) <= 64
    pixels = preprocess(noise(*size))
    assert pixels.shape == (3, rows * 16, columns * 16)
    assert np.isfinite(pixels).all()


def test_transformers_itself_fails_where_hf_mode_keeps_one_pixel() -> None:
    with pytest.raises(ValueError, match="height=0"):
        hf_reference(noise(5000, 1), 16, 1024)
    assert PIXTRAL_HF.grid(5000, 1) == (64, 1)


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
def test_budget_takes_the_largest_side_that_fits(mode: str) -> None:
    compared = 0
    for budget in (2, 5, 64, 300, 1000):
        limited = Preprocess(16, 1024, mode, image_tokens=budget)
        for width, height in random_sizes(25, 3000):
            grids = {side: Preprocess(16, side, mode).grid(width, height) for side in range(16, 1025)}
            fitting = [side for side, grid in grids.items() if token_count(*grid) <= budget]
            taken = limited.grid(width, height)
            assert token_count(*taken) <= budget
            if fitting:
                assert taken == grids[max(fitting)], (budget, width, height)
                compared += 1
    assert compared >= 100  # of 125: in the smallest budget not every shape has a side that fits


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
def test_picture_within_the_budget_is_untouched(mode: str) -> None:
    picture = noise(400, 300)  # 25 x 19 patches, 494 tokens
    free = Preprocess(16, 1024, mode)
    assert np.array_equal(Preprocess(16, 1024, mode, image_tokens=494)(picture), free(picture))
    assert token_count(*Preprocess(16, 1024, mode, image_tokens=493).grid(400, 300)) <= 493


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
def test_more_budget_never_means_fewer_tokens(mode: str) -> None:
    for size in random_sizes(10, 3000):
        counts = [token_count(*Preprocess(16, 1024, mode, image_tokens=n).grid(*size)) for n in range(2, 400, 9)]
        assert all(small <= large for small, large in pairwise(counts))


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3000, 3000), (1, 5000), (5000, 1)])
def test_smallest_budget_leaves_one_patch_of_any_picture(mode: str, size: tuple[int, int]) -> None:
    assert Preprocess(16, 1024, mode, image_tokens=2).grid(*size) == (1, 1)


def test_budget_decides_the_shape_of_the_pixels() -> None:
    preprocess = Preprocess(16, 1024, image_tokens=100)
    columns, rows = preprocess.grid(640, 480)
    assert preprocess(noise(640, 480)).shape == (3, rows * 16, columns * 16)


@pytest.mark.parametrize(
    ("patch_size", "max_side", "mode", "image_tokens", "message"),
    [
        (16, 1024, "hugging", None, "unknown preprocess mode 'hugging'"),
        (16, 15, "mistral", None, "longest image side 15 px"),
        (0, 15, "mistral", None, "patch size 0"),
        (16, 1024, "hf", 1, "budget of 1 tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    patch_size: int, max_side: int, mode: str, image_tokens: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Preprocess(patch_size, max_side, mode, image_tokens)
    assert caught.value.hint


def test_unknown_mode_lists_the_valid_ones() -> None:
    with pytest.raises(InputError) as caught:
        Preprocess(16, 1024, "pil")
    assert all(mode in caught.value.hint for mode in PREPROCESS_MODES)


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
def test_only_rgb_pictures_are_taken(mode: str) -> None:
    with pytest.raises(InputError, match="got RGBA"):
        Preprocess(16, 1024, mode)(Image.new("RGBA", (20, 20)))


def test_real_pictures_have_their_listed_grids(shared_images: Path) -> None:
    with (shared_images / "tokens.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    decodable = 0
    for row in rows:
        grid = (int(row["cols"]), int(row["rows"]))
        assert PIXTRAL.grid(int(row["width"]), int(row["height"])) == grid, row["file"]
        assert token_count(*grid) == int(row["tokens_incl_break_end"])
        try:  # the list was made without turning pictures upright
            picture = decode_image((shared_images / row["file"]).read_bytes(), row["file"], apply_exif=False).pixels
        except ImageError:
            continue
        assert PIXTRAL(picture).shape == (3, int(row["resized_h"]), int(row["resized_w"])), row["file"]
        decodable += 1
    assert decodable == 30


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
@pytest.mark.parametrize("image_tokens", [None, 2, 50, 1000])
@pytest.mark.parametrize(("patch_size", "max_side"), [(16, 1024), (16, 1000), (28, 1540), (14, 100)])
def test_what_is_drawn_at_its_size_is_not_scaled(
    patch_size: int, max_side: int, image_tokens: int | None, mode: str
) -> None:
    preprocess = Preprocess(patch_size, max_side, mode, image_tokens)
    for width, height in [(595.28, 841.89), (1e9, 1.0), (0.001, 0.001), *random_sizes(4, 1500)]:
        drawn = preprocess.drawn_size(width, height)
        columns, rows = preprocess.grid(*drawn)
        assert drawn == (columns * patch_size, rows * patch_size)
        assert image_tokens is None or token_count(columns, rows) <= image_tokens


def test_what_is_drawn_has_the_grid_of_a_large_picture_of_its_ratio() -> None:
    for width, height in ((4000, 3000), (2480, 3508), (1500, 9000)):
        columns, rows = PIXTRAL.grid(width, height)
        assert PIXTRAL.drawn_size(width / 72, height / 72) == (columns * 16, rows * 16)
