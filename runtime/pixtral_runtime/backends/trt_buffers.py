"""Device memory that TensorRT sessions bind: outputs that return to a pool, and the key/value cache."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

from pixtral_runtime.backends.cuda import DeviceStream, Memory
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.spec import CachePairs
from pixtral_runtime.errors import ContextError

Shape = tuple[int, ...]


class TrtBuffer:
    """An output on the device. Its memory serves another run once nobody holds this object."""

    def __init__(
        self, device: DeviceStream, pool: list[Memory], memory: Memory, shape: Shape, dtype: np.dtype[Any]
    ) -> None:
        self._device, self._memory, self.shape, self.dtype = device, memory, shape, dtype
        weakref.finalize(self, pool.append, memory).atexit = False

    @property
    def address(self) -> int:
        return self._memory.address

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> Array:
        """Copy to the host. Waits for the run that makes it."""
        array = np.empty(self.shape, self.dtype)
        self._device.copy_to_host(array, self.address)
        return array


class TrtCache:
    """Past keys and values on the device, (slots, K, rows, E) each, with the rows of the engine.

    `addresses` are those of the past tensors by name; `memory` holds a block for each pair of `tensors`.
    """

    def __init__(
        self,
        device: DeviceStream,
        tensors: CachePairs,
        shape: Shape,
        dtype: np.dtype[Any],
        memory: list[Memory],
        hint: str,
    ) -> None:
        self._device, self._memory, self._hint = device, memory, hint
        self.tensors, self.shape, self.dtype = tensors, shape, dtype
        self.addresses = {past.name: block.address for (past, _), block in zip(tensors, memory, strict=True)}

    @property
    def slots(self) -> int:
        return self.shape[0]

    @property
    def rows(self) -> int:
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        """Of each tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def reserve(self, rows: int) -> None:
        """Raises ContextError beyond the engine's rows: TensorRT knows no cache that grows."""
        if rows > self.rows:
            raise ContextError(f"{rows} cache rows are needed, the engine has {self.rows}", f"{self._hint} {rows}")

    def layers(self) -> list[tuple[Array, Array]]:
        """Copies on the host. Waits for the steps before."""
        arrays = [np.empty(self.shape, self.dtype) for _ in self.tensors]
        for array, address in zip(arrays, self.addresses.values(), strict=True):
            self._device.copy_to_host(array, address)
        return list(zip(arrays[::2], arrays[1::2], strict=True))  # `GraphSpec.caches` has key before value

    def shrink(self, rows: int) -> None:
        """Keeps its rows, which are the engine's."""

    def view(self, start: int, stop: int) -> TrtCache:
        size = self.nbytes // self.slots
        shape = (stop - start, *self.shape[1:])
        part = TrtCache(self._device, self.tensors, shape, self.dtype, self._memory, self._hint)
        part.addresses = {name: address + start * size for name, address in self.addresses.items()}
        return part

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Queued on the device, head by head."""
        _, heads, most, head_dim = self.shape
        row = head_dim * self.dtype.itemsize
        slot = heads * most * row
        for address in self.addresses.values():
            self._device.copy_rows(address + target * slot, address + source * slot, rows * row, most * row, heads)
