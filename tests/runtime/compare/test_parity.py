"""The inputs of checks reach the edges of what a bundle takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from helpers.tiny import tiny_config
from pixtral_runtime.bundle.manifest import Bundle, Limits
from pixtral_runtime.compare.parity import vision_cases
from pixtral_runtime.inputs.preprocess import default_preprocess


@pytest.mark.parametrize("side", [256, 96, 16])
def test_the_largest_pictures_that_a_bundle_takes_are_among_the_cases(side: int) -> None:
    limits = Limits(max_context=512, max_image_side=side)
    bundle = Bundle(Path("b"), tiny_config(), "float32", "float32", limits, 24, {}, {})
    seen = {pixels.shape[1:] for _, pixels in vision_cases(bundle)}
    preprocess = default_preprocess(bundle)
    for width, height in ((2000, 2000), (2000, 1000), (1000, 2000), (4000, 1), (1, 4000)):
        assert preprocess(Image.new("RGB", (width, height))).shape in seen
