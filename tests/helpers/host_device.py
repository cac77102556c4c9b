"""A device in host memory: NumPy and a work queue.

Like a GPU, it works later: what is queued runs when the host asks for a result. What a GPU leaves undefined (memory
outside an allocation, a copy from the host in a captured graph) raises StandInError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import MemoryShortageError

Shape = tuple[int, ...]
ALIGNMENT = 256
GARBAGE = 0x7F  # what fresh memory holds: NaN in float16, 127 in int8


class StandInError(Exception):
    """Undefined behaviour on a device."""


class HostDevice:
    """A `cuda.Device` in host memory. It has `most_bytes`.

    `calls` counts methods; `events` lists runs and copies to the host.
    """

    stream = 7
    name = "Stand-In GPU 1"
    most_bytes = 1 << 40

    def __init__(self) -> None:
        self.memory: dict[int, Array] = {}
        self.calls: Counter[str] = Counter()
        self.events: list[str] = []
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], Callable[[], None]]] | None = None

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    def alloc(self, nbytes: int) -> int:
        if sum(memory.size for memory in self.memory.values()) + nbytes > self.most_bytes:
            raise MemoryShortageError(f"the GPU has too little memory: cudaMalloc of {nbytes} bytes")
        self.calls["alloc"] += 1
        raw = np.full(nbytes + ALIGNMENT, GARBAGE, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        memory = raw[start : start + nbytes]
        self.memory[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def free(self, address: int) -> None:
        self.calls["free"] += 1
        self._flush()  # as cudaFree does
        self.memory.pop(address)[:] = GARBAGE

    def free_bytes(self) -> int:
        return 1 << 30

    def zero(self, address: int, nbytes: int) -> None:
        self.enqueue(lambda: self.view(address, (nbytes,), np.dtype(np.uint8)).fill(0))

    def copy_to_device(self, address: int, array: Array) -> None:
        staged = array.copy()
        self.enqueue(lambda: np.copyto(self.view(address, staged.shape, staged.dtype), staged))

    def copy_within(self, target: int, source: int, nbytes: int) -> None:
        kind = np.dtype(np.uint8)
        self.enqueue(lambda: np.copyto(self.view(target, (nbytes,), kind), self.view(source, (nbytes,), kind)))

    def copy_rows(self, target: int, source: int, nbytes: int, pitches: tuple[int, int], count: int) -> None:
        for index in range(count):
            self.copy_within(target + index * pitches[0], source + index * pitches[1], nbytes)

    def copy_to_host(self, array: Array, address: int) -> None:
        self.calls["copy_to_host"] += 1
        self.events.append("copy_to_host")
        self._flush()
        np.copyto(array, self.view(address, array.shape, array.dtype))

    def wait(self) -> None:
        self._flush()

    def begin_capture(self) -> None:
        self._recording = []

    def end_capture(self) -> Any:
        recording, self._recording = self._recording, None
        return recording

    def launch(self, graph: Any) -> None:
        self.calls["launch"] += 1
        for prepare in graph:
            self._queue.append(prepare())

    def release(self, graph: Any) -> None:
        self.calls["release"] += 1
        graph.clear()

    # For the stand-in's context

    def enqueue(self, work: Callable[[], None], check: Callable[[], None] | None = None) -> None:
        """Queue work, or record it with a check for each launch."""
        if self._recording is None:
            self._queue.append(work)
        elif check is None:
            raise StandInError("a copy was captured: a replay would copy the same values again")
        else:
            self._recording.append(lambda: (check(), work)[1])

    def view(self, address: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """Memory as an array. Raises StandInError outside an allocation."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        for start, memory in self.memory.items():
            if start <= address and address + nbytes <= start + memory.size:
                return memory[address - start :][:nbytes].view(dtype).reshape(shape)
        raise StandInError(f"{nbytes} bytes at {address:#x} are not in one allocation")

    def _flush(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()


class EagerDevice(HostDevice):
    """Works at once, as ONNX Runtime's CPU provider does."""

    def enqueue(self, work: Callable[[], None], check: Callable[[], None] | None = None) -> None:
        super().enqueue(work, check)
        self._flush()
