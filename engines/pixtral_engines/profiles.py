"""The shapes that engines are built for: optimization profiles, from the bundle's tensors and the user's limits.

A profile gives each dimension letter of `pixtral_runtime.spec` its smallest, usual and largest size. TensorRT picks
kernels for the usual one and reserves memory for the largest, so stages of unlike shapes get a profile each: small and
document-sized images, prefill and decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixtral_runtime.errors import InputError
from pixtral_runtime.generate import PREFILL_CHUNK
from pixtral_runtime.preprocess import token_count

if TYPE_CHECKING:
    from pixtral_runtime.bundle import Bundle
    from pixtral_runtime.spec import TensorSpec

Range = tuple[int, int, int]
"""Smallest, usual and largest."""
Profile = dict[str, Range]
"""By dimension letter."""

TEXT_TOKENS = 512  # of prompt and answer beside the largest image, in the default context
ROWS_STEP = 256
WEIGHT_ONLY = ("int4", "nvfp4")
"""Recipes whose decoder gets one profile for prefill and decode. With two, TensorRT-RTX 1.7 stores some weights in two
forms: 495 MB instead of 309 for two layers of the 12B in int4."""


@dataclass(frozen=True)
class Shapes:
    """What engines of a bundle must serve: `context` cache rows a slot, `batch` slots, prefill in steps of `chunk`."""

    context: int
    batch: int = 1
    chunk: int = PREFILL_CHUNK

    @classmethod
    def of(cls, bundle: Bundle, context: int | None, batch: int, chunk: int) -> Shapes:
        """Limits with the default context: the largest image and some text. Raises InputError."""
        side = bundle.limits.max_image_side // bundle.model.vision.patch_size
        usual = -(-(token_count(side, side) + TEXT_TOKENS) // ROWS_STEP) * ROWS_STEP
        rows = context or min(usual, bundle.limits.max_context)
        if rows > bundle.limits.max_context:
            raise InputError(
                f"--context {rows} is more than the bundle's {bundle.limits.max_context}",
                f"--context {bundle.limits.max_context}, or pixtral export … --max-context {rows}",
            )
        return cls(rows, batch, min(chunk, rows))


def profiles(bundle: Bundle, graph: str, shapes: Shapes) -> list[Profile]:
    """The profiles of a graph's engine."""
    one, slots, rows = (1, 1, 1), (1, shapes.batch, shapes.batch), (shapes.context,) * 3
    chunk = (1, shapes.chunk, shapes.chunk)
    if graph == "vision":
        return _vision(bundle, slots)
    if graph == "embed":
        return [{"B": one, "T": chunk, "F": chunk}, {"B": slots, "T": one, "F": one}]
    if bundle.precision in WEIGHT_ONLY:
        return [{"B": slots, "T": (1, 1, shapes.chunk), "R": slots, "C": rows}]
    return [{"B": one, "T": chunk, "R": one, "C": rows}, {"B": slots, "T": one, "R": slots, "C": rows}]


def _vision(bundle: Bundle, slots: Range) -> list[Profile]:
    """Images up to half the largest side, several at once, and up to the largest side, one by one."""
    patch, side = bundle.model.vision.patch_size, bundle.limits.max_image_side

    def up_to(share: float, usual: float) -> Range:
        largest, middle = (max(1, int(side * part) // patch) * patch for part in (share, usual))
        return patch, middle, largest

    return [
        {"B": slots, "H": up_to(1 / 2, 3 / 8), "W": up_to(1 / 2, 3 / 8)},
        {"B": (1, 1, 1), "H": up_to(1, 3 / 4), "W": up_to(1, 1)},
    ]


def ranges(tensor: TensorSpec, profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, usual and largest shape of a tensor."""
    per_axis = [(dim, dim, dim) if isinstance(dim, int) else profile[dim] for dim in tensor.shape]
    smallest, usual, largest = zip(*per_axis, strict=True)
    return smallest, usual, largest
