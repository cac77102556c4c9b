"""Device memory that sessions bind, TensorRT's and ONNX Runtime's: outputs that return to a pool, and the cache."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from pixtral_runtime.backends.cuda import DeviceStream, Memory
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.spec import CachePairs
from pixtral_runtime.errors import ContextError

Shape = tuple[int, ...]

LEAST_ROWS = 512  # of a cache that grows


class DeviceBuffer:
    """An output on the device. Its memory serves another run once nobody holds this object, or a part of it."""

    def __init__(
        self, device: DeviceStream, pool: list[Memory], memory: Memory, shape: Shape, dtype: np.dtype[Any]
    ) -> None:
        self._device, self.address, self.shape, self.dtype = device, memory.address, shape, dtype
        self._whole: DeviceBuffer | None = None  # of which this is a part
        weakref.finalize(self, pool.append, memory).atexit = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceBuffer:
        """A row, or consecutive rows, over the same memory."""
        start, stop, _ = (index if isinstance(index, slice) else slice(index, index + 1)).indices(len(self))
        part = copy.copy(self)
        part._whole = self
        part.address += start * self.nbytes // max(1, len(self))
        part.shape = (stop - start, *self.shape[1:]) if isinstance(index, slice) else self.shape[1:]
        return part

    def numpy(self) -> Array:
        """Copy to the host. Waits for the run that makes it."""
        array = np.empty(self.shape, self.dtype)
        self._device.copy_to_host(array, self.address)
        return array

    def wait(self) -> None:
        """Until the run that makes it is done."""
        self._device.wait()

    @classmethod
    def join(cls, parts: Sequence[DeviceBuffer]) -> DeviceBuffer:
        """Their rows below each other; a single one as it is."""
        first, *others = parts
        if not others:
            return first
        shape = (sum(map(len, parts)), *first.shape[1:])
        memory = Memory(first._device, sum(part.nbytes for part in parts))
        joined, end = cls(first._device, [], memory, shape, first.dtype), memory.address
        for part in parts:
            first._device.copy_within(end, part.address, part.nbytes)
            end += part.nbytes
        return joined


class DeviceCache:
    """Past keys and values on the device, (slots, K, rows, E) each, zeroed at first.

    `shape` is the one of each tensor, `dtype` theirs; with `rows_first` they lie in memory as (slots, rows, K · E). An
    engine's cache has the engine's rows, and `rebuild` is what makes one with more. Other caches grow up to `most`
    rows, in few sizes: a step over one of them can be recorded as a CUDA graph. `addresses` are those of the past
    tensors, in the order of `tensors`.
    """

    def __init__(
        self,
        device: DeviceStream,
        tensors: CachePairs,
        shape: Shape,
        dtype: np.dtype[Any],
        *,
        most: int,
        rebuild: str | None = None,
        rows_first: bool = False,
    ) -> None:
        self._device, self._most, self._rebuild, self._rows_first = device, most, rebuild, rows_first
        self.tensors, self.shape, self.dtype = tensors, shape, dtype
        self._memory = [self._zeroed() for _ in tensors]
        self._place()

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

    @property
    def bound_shape(self) -> Shape:
        """As the graph has it."""
        slots, heads, rows, size = self.shape
        return (slots, rows, heads * size) if self._rows_first else self.shape

    @property
    def _blocks(self) -> tuple[int, int]:
        """How many blocks of rows a slot has in a tensor, and the bytes of their rows."""
        _, heads, _, size = self.shape
        blocks = 1 if self._rows_first else heads
        return blocks, heads // blocks * size * self.dtype.itemsize

    def by_name(self) -> dict[str, int]:
        """Addresses by the names of the past tensors."""
        return {past.name: address for (past, _), address in zip(self.tensors, self.addresses, strict=True)}

    def reserve(self, rows: int) -> None:
        """Raises ContextError beyond an engine's rows, MemoryShortageError where the device has no more memory: the
        cache is lost then."""
        if rows <= self.rows:
            return
        if rows > self._most:
            who = "the bundle" if self._rebuild is None else "the engine"
            remedy = [f"{self._rebuild} {rows}"] if self._rebuild else []
            raise ContextError(f"{rows} cache rows are needed, {who} has {self._most}", *remedy)
        before, slots, heads = self.rows, *self.shape[:2]
        self.shape = (slots, heads, whole_rows(rows, self._most), self.shape[3])
        blocks, row = self._blocks
        for index, old in enumerate(self._memory):  # one by one: only one is there twice
            new = self._zeroed()
            pitches = (self.rows * row, before * row)
            self._device.copy_rows(new.address, old.address, before * row, pitches, slots * blocks)
            self._memory[index] = new
        self._place()

    def layers(self) -> list[tuple[Array, Array]]:
        """Copies on the host. Waits for the steps before."""
        slots, heads, rows, size = self.shape
        shape = (slots, rows, heads, size) if self._rows_first else self.shape
        arrays = [np.empty(shape, self.dtype) for _ in self.tensors]
        for array, address in zip(arrays, self.addresses, strict=True):
            self._device.copy_to_host(array, address)
        if self._rows_first:
            arrays = [array.swapaxes(1, 2) for array in arrays]
        return list(zip(arrays[::2], arrays[1::2], strict=True))  # `GraphSpec.caches` has key before value

    def shrink(self, rows: int) -> None:
        """Keeps its rows: steps read no more of them than they need, or are bound to them."""

    def view(self, start: int, stop: int) -> DeviceCache:
        if (start, stop) not in self._views:
            size = self.nbytes // self.slots
            part = copy.copy(self)
            part.shape, part._views = (stop - start, *self.shape[1:]), {}
            part.addresses = tuple(address + start * size for address in self.addresses)
            self._views[start, stop] = part
        return self._views[start, stop]

    def of(self, tensors: CachePairs) -> DeviceCache:
        """Some of its tensors, consecutive ones, as a cache over the same memory. Good as long as a view is."""
        if tensors not in self._views:
            start = self.tensors.index(tensors[0])
            part = copy.copy(self)
            part.tensors, part._views = tensors, {}
            part.addresses = self.addresses[start : start + len(tensors)]
            self._views[tensors] = part
        return self._views[tensors]

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Queued on the device, one copy for all heads of a tensor."""
        blocks, row = self._blocks
        slot, pitch = self.nbytes // self.slots, self.rows * row
        for address in self.addresses:
            self._device.copy_rows(address + target * slot, address + source * slot, rows * row, (pitch, pitch), blocks)

    def _zeroed(self) -> Memory:
        memory = Memory(self._device, self.nbytes)
        self._device.zero(memory.address, self.nbytes)
        return memory

    def _place(self) -> None:
        self.addresses = tuple(block.address for block in self._memory)
        self._views: dict[tuple[int, int] | CachePairs, DeviceCache] = {}


def whole_rows(rows: int, most: int) -> int:
    """Up to the next power of two, where that is not too many."""
    return min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), most)
