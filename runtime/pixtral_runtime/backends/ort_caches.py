"""Key/value caches for ONNX Runtime: NumPy arrays on the host, or ONNX Runtime's own memory on a device.

Steps bind the same memory as past and present, so that a step writes a few rows instead of copying everything. On a
device growing, shrinking and copying rows from slot to slot go over the host, tensor by tensor: ONNX Runtime has no
call that copies a part of a tensor.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

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


class DeviceCache:
    """Past keys and values on a device, (slots, K, rows, E) each, in ONNX Runtime's own memory.

    `arrays` are what the cache starts with, one for each pair of `tensors`; they are copied. `device` is "cuda" or
    "cpu".
    """

    def __init__(self, tensors: CachePairs, arrays: list[Array], device: str) -> None:
        self.tensors, self._device, self._dtype = tensors, device, arrays[0].dtype
        self._values = [self._placed(array) for array in arrays]
        self._range = range(arrays[0].shape[0])  # slots

    @property
    def slots(self) -> int:
        return len(self._range)

    @property
    def rows(self) -> int:
        return int(self._values[0].shape()[2])

    def reserve(self, rows: int) -> None:
        if rows > self.rows:
            self._resize(rows)

    def shrink(self, rows: int) -> None:
        self._resize(min(rows, self.rows))

    def view(self, start: int, stop: int) -> DeviceCache:
        view = copy.copy(self)
        view._range = self._range[start:stop]
        return view

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        for value in self._values:
            array = np.array(value.numpy())
            array[self._range[target], :, :rows] = array[self._range[source], :, :rows]
            value.update_inplace(array)

    def layers(self) -> list[tuple[Array, Array]]:
        """Copies on the host."""
        arrays = [value.numpy()[self._range.start : self._range.stop] for value in self._values]
        return list(zip(arrays[::2], arrays[1::2], strict=True))  # `GraphSpec.caches` has key before value

    def bind(self, binding: ort.IOBinding) -> None:
        shape = (self.slots, *self._values[0].shape()[1:])
        offset = self._range.start * math.prod(shape[1:]) * self._dtype.itemsize
        for (past, present), value in zip(self.tensors, self._values, strict=True):
            memory = (self._device, 0, self._dtype, shape, value.data_ptr() + offset)
            binding.bind_input(past.name, *memory)
            binding.bind_output(present.name, *memory)

    def _resize(self, rows: int) -> None:
        kept = min(rows, self.rows)
        slots, heads, _, head_dim = self._values[0].shape()
        for index, old in enumerate(self._values):  # one by one: only one is there twice
            resized = np.zeros((slots, heads, whole_steps(rows), head_dim), self._dtype)
            resized[:, :, :kept] = old.numpy()[:, :, :kept]
            self._values[index] = self._placed(resized)

    def _placed(self, array: Array) -> Any:
        """A copy of an array on the device."""
        import onnxruntime as ort

        value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, self._device)
        value.update_inplace(array)
        return value
