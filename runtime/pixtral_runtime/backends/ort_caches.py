"""The key/value cache of ONNX Runtime on the CPU: NumPy arrays.

Steps bind the same memory as past and present, so that a step writes a few rows instead of copying everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.spec import CachePairs

if TYPE_CHECKING:
    import onnxruntime as ort

CACHE_STEP_ROWS = (
    64  # rows; attention reads every bound row, growing copies them all: a step is paid back within itself
)


class OrtCache:
    """Cache buffers on the host, one NumPy array and one OrtValue over it per tensor.

    `arrays` (slots, K, rows, E) are what the cache starts with, one for each pair of `tensors`.
    """

    def __init__(self, tensors: CachePairs, arrays: list[Array]) -> None:
        self.tensors = tensors
        self._hold(arrays)

    @property
    def slots(self) -> int:
        return int(self._arrays[0].shape[0])

    @property
    def rows(self) -> int:
        return int(self._arrays[0].shape[2])

    def reserve(self, rows: int) -> None:
        if rows > self.rows:
            self._resize(rows)

    def shrink(self, rows: int) -> None:
        self._resize(min(rows, self.rows))

    def view(self, start: int, stop: int) -> OrtCache:
        if (start, stop) not in self._views:
            self._views[start, stop] = OrtCache(self.tensors, [array[start:stop] for array in self._arrays])
        return self._views[start, stop]

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        for array in self._arrays:
            array[target, :, :rows] = array[source, :, :rows]

    def layers(self) -> list[tuple[Array, Array]]:
        return list(zip(self._arrays[::2], self._arrays[1::2], strict=True))  # `GraphSpec.caches` has key before value

    def bind(self, binding: ort.IOBinding) -> None:
        for (past, present), value in zip(self.tensors, self._values, strict=True):
            binding.bind_ortvalue_input(past.name, value)
            binding.bind_ortvalue_output(present.name, value)

    def _resize(self, rows: int) -> None:
        slots, heads, before, head_dim = self._arrays[0].shape
        shape = (slots, heads, whole_steps(rows), head_dim)
        kept = min(before, shape[2])
        for index, old in enumerate(self._arrays):  # one by one: only one is there twice
            self._arrays[index] = np.zeros(shape, old.dtype)
            self._arrays[index][:, :, :kept] = old[:, :, :kept]
        self._hold(self._arrays)

    def _hold(self, arrays: list[Array]) -> None:
        import onnxruntime as ort

        self._arrays = arrays
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        self._views: dict[tuple[int, int], OrtCache] = {}


def whole_steps(rows: int) -> int:
    """Up to a whole step: caches grow rarely."""
    return -(-rows // CACHE_STEP_ROWS) * CACHE_STEP_ROWS
