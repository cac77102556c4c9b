"""The functions of NVIDIA's `cuda.bindings.runtime` that pixtral calls, over the CUDA stand-in.

NVIDIA's package brings a CUDA runtime of its own, which wants a driver. With this folder on PYTHONPATH pixtral's own
`CudaDevice` runs over the stand-in instead.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

_RUNTIME = ctypes.CDLL("libcudart.so.13")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t

cudaHostAllocDefault = 0
cudaStreamNonBlocking = 1


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


def _pointer(function: str, *arguments: Any) -> tuple[int, int | None]:
    made = _POINTER()
    return getattr(_RUNTIME, function)(ctypes.byref(made), *arguments), made.value


def cudaSetDevice(index: int) -> tuple[int]:
    return (_RUNTIME.cudaSetDevice(index),)


def cudaDeviceGetAttribute(attribute: int, index: int) -> tuple[int, int]:
    value = ctypes.c_int()
    return _RUNTIME.cudaDeviceGetAttribute(ctypes.byref(value), int(attribute), index), value.value


class cudaDeviceProp:
    def __init__(self, name: bytes) -> None:
        self.name = name


def cudaGetDeviceProperties(index: int) -> tuple[int, cudaDeviceProp]:
    """Of its many fields the first, the name."""
    properties = ctypes.create_string_buffer(1 << 14)
    return _RUNTIME.cudaGetDeviceProperties(properties, index), cudaDeviceProp(properties.value)


def cudaGetLastError() -> tuple[cudaError_t]:
    """The stand-in keeps none."""
    return (cudaError_t.cudaSuccess,)


def cudaStreamCreateWithFlags(flags: int) -> tuple[int, int | None]:
    return _pointer("cudaStreamCreateWithFlags", flags)


def cudaStreamSynchronize(stream: int) -> tuple[int]:
    return (_RUNTIME.cudaStreamSynchronize(_POINTER(stream)),)


def cudaHostAlloc(nbytes: int, flags: int) -> tuple[int, int | None]:
    return _pointer("cudaHostAlloc", _SIZE(nbytes), flags)


def cudaMalloc(nbytes: int) -> tuple[int, int | None]:
    return _pointer("cudaMalloc", _SIZE(nbytes))


def cudaFree(address: int) -> tuple[int]:
    return (_RUNTIME.cudaFree(_POINTER(address)),)


def cudaMemGetInfo() -> tuple[int, int, int]:
    available, everything = _SIZE(), _SIZE()
    status = _RUNTIME.cudaMemGetInfo(ctypes.byref(available), ctypes.byref(everything))
    return status, available.value, everything.value


def cudaMemsetAsync(address: int, value: int, nbytes: int, stream: int) -> tuple[int]:
    return (_RUNTIME.cudaMemsetAsync(_POINTER(address), value, _SIZE(nbytes), _POINTER(stream)),)


def cudaMemcpyAsync(target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
    return (_RUNTIME.cudaMemcpyAsync(_POINTER(target), _POINTER(source), _SIZE(nbytes), int(kind), _POINTER(stream)),)


def cudaMemcpy2DAsync(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int, stream: int
) -> tuple[int]:
    to, of = (_POINTER(target), _SIZE(target_pitch)), (_POINTER(source), _SIZE(source_pitch))
    return (_RUNTIME.cudaMemcpy2DAsync(*to, *of, _SIZE(width), _SIZE(height), int(kind), _POINTER(stream)),)


def cudaStreamBeginCapture(stream: int, mode: int) -> tuple[int]:
    return (_RUNTIME.cudaStreamBeginCapture(_POINTER(stream), int(mode)),)


def cudaStreamEndCapture(stream: int) -> tuple[int, int | None]:
    graph = _POINTER()
    return _RUNTIME.cudaStreamEndCapture(_POINTER(stream), ctypes.byref(graph)), graph.value


def cudaGraphInstantiate(graph: int, flags: int) -> tuple[int, int | None]:
    return _pointer("cudaGraphInstantiate", _POINTER(graph), ctypes.c_ulonglong(flags))


def cudaGraphLaunch(graph: int, stream: int) -> tuple[int]:
    return (_RUNTIME.cudaGraphLaunch(_POINTER(graph), _POINTER(stream)),)


def cudaGraphDestroy(graph: int) -> tuple[int]:
    return (_RUNTIME.cudaGraphDestroy(_POINTER(graph)),)


def cudaGraphExecDestroy(graph: int) -> tuple[int]:
    return (_RUNTIME.cudaGraphExecDestroy(_POINTER(graph)),)


def cudaGetErrorString(status: int) -> tuple[int, bytes]:
    return 0, f"error {status} of the CUDA stand-in".encode()
