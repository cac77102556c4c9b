"""A tensor in a few numbers, from which the distance of two tensors can still be told.

Each value is added, with a sign, to one of `BUCKETS` sums; signs and buckets are the same for every tensor (a count
sketch). The sums of a difference are as large as the difference itself, give or take a quarter: values that moved,
changed their sign or their size are seen as if the whole tensor had been kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.certificate import Sketch

BUCKETS = 16
DIGITS = 5  # kept of a number, counted from the tensor's largest: more would differ between processors


def sketch_of(tensor: Array) -> Sketch:
    """All numbers are infinite where one of the tensor's is none."""
    values = tensor.astype(np.float64).ravel()
    if not np.isfinite(values).all():
        return Sketch(tensor.shape, math.inf, math.inf, (math.inf,) * BUCKETS)
    codes = _codes(values.size)
    signed = np.where(codes >= 128, -values, values)
    sums = np.bincount(codes % BUCKETS, signed, BUCKETS)
    norm, largest = rounded((math.sqrt(float(np.square(values).sum())), float(np.abs(values).max(initial=0.0))))
    return Sketch(tensor.shape, norm, largest, rounded(sums, norm))


def distance(seen: Sketch, expected: Sketch) -> float:
    """About |seen - expected| / |expected| of the tensors; infinite for other shapes, or what is not finite."""
    if seen.shape != expected.shape or not math.isfinite(seen.norm) or len(seen.sums) != len(expected.sums):
        return math.inf
    pairs = zip(seen.sums, expected.sums, strict=True)
    apart = max(math.sqrt(sum((a - b) ** 2 for a, b in pairs)), abs(seen.norm - expected.norm))
    return apart / max(expected.norm, 1e-30)


def noise(name: str, count: int) -> npt.NDArray[np.uint8]:
    """Bytes (count,) that are the same on every machine and with every version of NumPy."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(count), np.uint8)


def rounded(values: Iterable[float], scale: float = 0.0) -> tuple[float, ...]:
    """To `DIGITS` digits of the scale, or of each value where that is larger."""

    def one(value: float) -> float:
        largest = max(abs(value), scale)
        return round(value, DIGITS - 1 - math.floor(math.log10(largest))) + 0.0 if largest else 0.0

    return tuple(one(float(value)) for value in values)


def _codes(count: int) -> npt.NDArray[np.uint8]:
    return _all_codes(1 << max(count - 1, 1).bit_length())[:count]


@lru_cache(maxsize=1)
def _all_codes(count: int) -> npt.NDArray[np.uint8]:
    return noise("sketch", count)
