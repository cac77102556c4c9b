"""What CUDA refuses reaches the user with a way out. Calls themselves await a device."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from pixtral_runtime.backends.cuda import CudaDevice, Memory, use_gpu
from pixtral_runtime.errors import MachineError, MemoryShortageError


def test_without_cuda_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MachineError, match="needs the package 'cuda-bindings'") as raised:
        CudaDevice()
    assert raised.value.hint == "pip install 'pixtral[rtx]'"


class FakeCuda:
    """cuda-bindings that fail with one status: a tuple of it from every call."""

    cudaStreamNonBlocking = 1
    cudaError_t = SimpleNamespace(
        cudaSuccess=0,
        cudaErrorMemoryAllocation=2,
        cudaErrorInsufficientDriver=35,
        cudaErrorNoDevice=100,
        cudaErrorInvalidDevice=101,
    )

    def __init__(self, failing: str, status: int) -> None:
        self._failing, self._status = failing, status
        self.called: list[str] = []

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"text of %d" % status

    def __getattr__(self, name: str) -> Callable[..., tuple[int, int]]:
        self.called.append(name)
        return lambda *arguments: (self._status if name == self._failing else 0, 512)


@pytest.mark.parametrize(
    ("failing", "status", "message", "hint"),
    [
        ("cudaSetDevice", 35, "driver is missing, or too old for CUDA 13: text of 35", "580 or newer is needed"),
        ("cudaSetDevice", 100, "no such GPU with CUDA_VISIBLE_DEVICES=7: text of 100", "nvidia-smi -L"),
        ("cudaSetDevice", 101, "no such GPU with CUDA_VISIBLE_DEVICES=7: text of 101", "device=0"),
        ("cudaSetDevice", 999, "CUDA: cudaSetDevice: text of 999", "nvidia-smi"),
        ("cudaMalloc", 2, "too little memory: cudaMalloc of 4096 bytes", "smaller --context"),
        ("cudaMalloc", 999, "CUDA: cudaMalloc: text of 999", "nvidia-smi"),
    ],
)
def test_what_cuda_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, failing: str, status: int, message: str, hint: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeCuda(failing, status))
    with pytest.raises(MachineError, match=message) as raised:
        Memory(CudaDevice(), 4096)
    assert hint in raised.value.hint


def test_a_graph_that_cannot_be_made_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the recording, nor CUDA's note of the error, which TensorRT would take for one of its own."""
    cuda = FakeCuda("cudaGraphInstantiate", 2)
    monkeypatch.setattr(importlib, "import_module", lambda name: cuda)
    with pytest.raises(MemoryShortageError, match="too little memory: cudaGraphInstantiate: text of 2"):
        CudaDevice().end_capture()
    assert {"cudaGraphDestroy", "cudaGetLastError"} <= set(cuda.called)


@pytest.mark.parametrize(
    ("seen", "asked", "left"),
    [("", 7, "7"), ("2,3", 1, "3"), ("GPU-aa, MIG-bb", 1, "MIG-bb")],
)
def test_one_gpu_of_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch, seen: str, asked: int, left: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    use_gpu(asked)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == (left, "PCI_BUS_ID")
    with pytest.raises(MachineError, match="names 1 GPUs, and GPU 1 is asked for"):
        use_gpu(1)
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
