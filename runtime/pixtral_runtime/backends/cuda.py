"""One CUDA device and one stream on it: all that engines need of CUDA, through NVIDIA's `cuda-bindings`.

Everything is queued on that one stream, so work runs in the order it was asked for and nothing waits for anything
else; only `copy_to_host` and large copies to the device wait. Each call ran on an H200 with cuda-bindings 13.3.1. Tests
put a device in host memory in its place.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import MachineError, MemoryShortageError, Option, extra_missing

STAGING_BYTES = 16 << 20  # pinned; the feeds of thousands of steps, or the pixels of one large image
STAGING_STEP = 256  # bytes; where the next array starts

VISIBLE = "CUDA_VISIBLE_DEVICES"


def use_gpu(index: int) -> None:
    """Let this process, and those that it starts, see one GPU only, counted as nvidia-smi does.

    Of those that CUDA_VISIBLE_DEVICES names, where it is set. To be called before anything opens a GPU.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    names = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    if names and index >= len(names):
        raise MachineError(f"{VISIBLE} names {len(names)} GPUs, and GPU {index} is asked for", Option("device", 0))
    os.environ[VISIBLE] = names[index] if names else str(index)


@dataclass(frozen=True)
class GpuModel:
    """What a GPU is called, and CUDA's compute capability, 89 for 8.9."""

    name: str
    capability: int


class DeviceStream(Protocol):
    """Memory, copies and one stream. Addresses are integers, sizes bytes."""

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT and ONNX Runtime take it."""

    @property
    def name(self) -> str:
        """The GPU's, as its maker calls it."""

    def alloc(self, nbytes: int) -> int:
        """Address of new memory, aligned to 256 bytes, its content undefined. Raises MachineError."""

    def free(self, address: int) -> None: ...

    def free_bytes(self) -> int:
        """Memory that nothing uses."""

    def zero(self, address: int, nbytes: int) -> None: ...

    def copy_to_device(self, address: int, array: Array) -> None:
        """Queue a copy of a contiguous array, which may be changed as soon as this returns."""

    def copy_within(self, target: int, source: int, nbytes: int) -> None: ...

    def copy_rows(self, target: int, source: int, nbytes: int, pitches: tuple[int, int], count: int) -> None:
        """Copy `count` runs of `nbytes`, each starting so many bytes after the one before, in target and in source."""

    def copy_to_host(self, array: Array, address: int) -> None:
        """Fill a contiguous array. Waits for all that was queued before."""

    def wait(self) -> None:
        """Until all that was queued is done."""

    def begin_capture(self) -> None:
        """Record what is queued from here on instead of running it."""

    def end_capture(self) -> Any:
        """The recorded work as a graph."""

    def launch(self, graph: Any) -> None: ...

    def release(self, graph: Any) -> None: ...


def gpu_here() -> GpuModel | None:
    """The GPU that this process uses; None where there is none, or no package to reach it."""
    try:
        device = CudaDevice()
    except MachineError:
        return None
    return GpuModel(device.name, device.capability)


class Memory:
    """Device memory that is freed with this object."""

    def __init__(self, device: DeviceStream, nbytes: int) -> None:
        self.address, self.nbytes = device.alloc(nbytes), nbytes
        weakref.finalize(self, device.free, self.address).atexit = False  # the process's end frees it


class CudaDevice:
    """A GPU by its index. Raises MachineError where there is none, or no package to reach it."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise extra_missing("cuda-bindings", "rtx", "Running engines") from error
        self._index = index
        self._call("cudaSetDevice", index)
        # A stream that waits for the legacy default stream would wait for other users of the device.
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        address = self._call("cudaHostAlloc", STAGING_BYTES, self._cuda.cudaHostAllocDefault)
        self._staging = np.ctypeslib.as_array((ctypes.c_uint8 * STAGING_BYTES).from_address(int(address)))
        self._staged = 0  # bytes of it that copies in flight may still read

    @property
    def stream(self) -> int:
        return int(self._stream)

    @property
    def name(self) -> str:
        properties = self._call("cudaGetDeviceProperties", self._index)
        return bytes(properties.name).rstrip(b"\0").decode("utf-8", "replace")

    @property
    def capability(self) -> int:
        """CUDA's compute capability, 89 for 8.9."""
        kinds = self._cuda.cudaDeviceAttr
        names = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        major, minor = (int(self._call("cudaDeviceGetAttribute", name, self._index)) for name in names)
        return 10 * major + minor

    def alloc(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])

    def zero(self, address: int, nbytes: int) -> None:
        self._call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def copy_to_device(self, address: int, array: Array) -> None:
        # What CUDA does with pageable memory differs from machine to machine: where the GPU reads it directly, a copy
        # may run after this returns. So small arrays are staged in pinned memory, and large ones waited for.
        if array.nbytes > len(self._staging):
            self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
            return self.wait()
        if self._staged + array.nbytes > len(self._staging):
            self.wait()
        part = self._staging[self._staged : self._staged + array.nbytes]
        part[:] = array.reshape(-1).view(np.uint8)
        self._staged += -(-array.nbytes // STAGING_STEP) * STAGING_STEP
        self._copy(address, part.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def copy_within(self, target: int, source: int, nbytes: int) -> None:
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice")

    def copy_rows(self, target: int, source: int, nbytes: int, pitches: tuple[int, int], count: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, pitches[0], source, pitches[1], nbytes, count, kind, self._stream)

    def copy_to_host(self, array: Array, address: int) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")
        self.wait()

    def wait(self) -> None:
        """Until all that was queued is done."""
        self._call("cudaStreamSynchronize", self._stream)
        self._staged = 0

    def begin_capture(self) -> None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> Any:
        recorded = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def release(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", target, source, nbytes, getattr(self._cuda.cudaMemcpyKind, kind), self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a CUDA function, a list of several, None of none. Raises MachineError where it fails."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if status == self._cuda.cudaError_t.cudaSuccess:
            return results if len(results) > 1 else next(iter(results), None)
        self._cuda.cudaGetLastError()  # clears it: TensorRT would take it for its own
        text = self._cuda.cudaGetErrorString(status)[1].decode()
        errors = self._cuda.cudaError_t
        if status == errors.cudaErrorInsufficientDriver:
            raise MachineError(
                f"the NVIDIA driver is missing, or too old for CUDA 13: {text}",
                "nvidia-smi: 580 or newer is needed",
            )
        if status in (errors.cudaErrorNoDevice, errors.cudaErrorInvalidDevice):
            seen = os.environ.get(VISIBLE)
            where = "" if seen is None else f" with {VISIBLE}={seen}"
            raise MachineError(f"CUDA finds no such GPU{where}: {text}", "nvidia-smi -L", Option("device", 0))
        if status == errors.cudaErrorMemoryAllocation:
            size = f" of {arguments[0]} bytes" if name == "cudaMalloc" else ""
            raise MemoryShortageError(
                f"the GPU has too little memory: {name}{size}: {text}",
                Option("batch", "SMALLER"),
                "pixtral build BUNDLE with a smaller --context or --batch, and nvidia-smi for what else uses it",
            )
        raise MachineError(f"CUDA: {name}: {text}", "nvidia-smi, then pixtral doctor")
