"""What checks of an export or an engine share: the inputs they run over, and what they say of a tensor.

The inputs are the shapes where exports and engines go wrong: one patch, a tall and a wide strip, the largest picture
square, upright and lying, two images a batch, and prompts with no, one, two and four images. The same bundle gets the
same inputs every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder

IMAGE_COUNTS = (0, 1, 2, 4)
DECODE_STEPS = 4


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of one case beside the reference's. `stage` is a graph, or prefill or decode where they stand apart.

    `error` is that of `relative_error`; `layer` is where it began, if that is known and the check failed.
    """

    stage: str
    case: str
    tensor: str
    error: float
    tolerance: float
    layer: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def relative_error(seen: Array, expected: Array) -> float:
    """max |seen - expected| / max |expected|; infinite where one of them is not finite."""
    a, b = seen.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0) / max(float(np.abs(b).max(initial=0.0)), 1e-30))


def vision_cases(bundle: Bundle) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Name and noise pixels (B, 3, H, W)."""
    patch, longest = bundle.model.vision.token_edge, bundle.limits.max_image_side
    side, half = default_preprocess(bundle).grid(longest, max(longest // 2, 1))  # as a picture has it
    random = np.random.default_rng(0)
    cases = {
        "1x1 patch": (1, 1, 1),
        "tall": (1, side, 1),
        "wide": (1, 1, side),
        "largest": (1, side, side),
        "upright": (1, side, half),
        "lying": (1, half, side),
        "batch 2": (2, 2, 3),
    }
    for case, (batch, rows, columns) in cases.items():
        yield case, random.standard_normal((batch, 3, rows * patch, columns * patch), np.float32)


def prompt_cases(prompts: PromptBuilder) -> Iterator[tuple[str, Prompt]]:
    """Name and prompt, with noise images of mixed sizes."""
    patch = prompts.bundle.model.vision.token_edge
    sizes = [(3 * patch, 2 * patch), (patch, 5 * patch), (4 * patch + 1, patch - 1), (2 * patch, 2 * patch)]
    for count in IMAGE_COUNTS:
        random = np.random.default_rng(count)
        pictures = [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes[:count]]
        yield f"{count} images", prompts.build(user_message("What is shown?", pictures), DECODE_STEPS)
