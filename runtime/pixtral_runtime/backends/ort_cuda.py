"""ONNX Runtime on a CUDA device: whether it can be had here, and a key/value cache that stays there.

Steps bind the same device memory as past and present, so nothing of the cache crosses to the host. Growing, shrinking
and copying rows from slot to slot do, tensor by tensor: ONNX Runtime has no call that copies a part of a tensor.

Not yet run on a device. Tests run the cache with "cpu" as the device, which is all of this code but the CUDA.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import MachineError, extra_missing

if TYPE_CHECKING:
    import onnxruntime as ort

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""What CUDA has no kernel for, ONNX Runtime gives to the CPU, and copies what it reads."""


def lists_cuda() -> bool:
    """Whether an ONNX Runtime built with CUDA is installed."""
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    return PROVIDERS[0] in ort.get_available_providers()


def require_cuda() -> None:
    """Raise MachineError where ONNX Runtime is built without CUDA or cannot open a device."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise extra_missing("onnxruntime-gpu", "gpu", "Running a bundle on a CUDA device") from error
    if not lists_cuda():
        raise MachineError(
            f"onnxruntime {ort.__version__} is built without CUDA",
            "pip uninstall -y onnxruntime && pip install 'pixtral[gpu]'",
        )
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()  # CUDA and cuDNN where pip installed them
    try:
        ort.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, "cuda")
    except RuntimeError as error:
        raise MachineError(
            f"ONNX Runtime cannot open a CUDA device: {error}", "nvidia-smi, then pixtral doctor"
        ) from error


class DeviceCache:
    """Past keys and values on a device, (slots, K, rows, E) each, in ONNX Runtime's own memory.

    `arrays` are what the cache starts with; they are copied. `device` is "cuda" or "cpu".
    """

    def __init__(self, names: tuple[str, ...], arrays: list[Array], device: str) -> None:
        self._names, self._device, self._dtype = names, device, arrays[0].dtype
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
        return list(zip(arrays[::2], arrays[1::2], strict=True))  # `cache_names` has key before value

    def bind(self, binding: ort.IOBinding) -> None:
        shape = (self.slots, *self._values[0].shape()[1:])
        offset = self._range.start * math.prod(shape[1:]) * self._dtype.itemsize
        for past, value in zip(self._names, self._values, strict=True):
            tensor = (self._device, 0, self._dtype, shape, value.data_ptr() + offset)
            binding.bind_input(past, *tensor)
            binding.bind_output(past.replace("past", "present", 1), *tensor)

    def _resize(self, rows: int) -> None:
        from pixtral_runtime.backends.ort_session import rounded

        kept = min(rows, self.rows)
        slots, heads, _, head_dim = self._values[0].shape()
        for index, old in enumerate(self._values):  # one by one: only one is there twice
            resized = np.zeros((slots, heads, rounded(rows), head_dim), self._dtype)
            resized[:, :, :kept] = old.numpy()[:, :, :kept]
            self._values[index] = self._placed(resized)

    def _placed(self, array: Array) -> Any:
        """A copy of an array on the device."""
        import onnxruntime as ort

        value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, self._device)
        value.update_inplace(array)
        return value
