"""What CUDA refuses reaches the user with a way out. Calls themselves await a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from pixtral_runtime.backends.cuda import CudaDevice, Memory
from pixtral_runtime.errors import MachineError


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
    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2)

    def __init__(self, failing: str, status: int) -> None:
        self._failing, self._status = failing, status

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"text of %d" % status

    def __getattr__(self, name: str) -> Callable[..., tuple[int, int]]:
        return lambda *arguments: (self._status if name == self._failing else 0, 512)


@pytest.mark.parametrize(
    ("failing", "status", "message", "hint"),
    [
        ("cudaSetDevice", 35, "CUDA: cudaSetDevice: text of 35", "nvidia-smi"),
        ("cudaMalloc", 2, "too little memory: cudaMalloc of 4096 bytes", "smaller --context"),
        ("cudaMalloc", 999, "CUDA: cudaMalloc: text of 999", "nvidia-smi"),
    ],
)
def test_what_cuda_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, failing: str, status: int, message: str, hint: str
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeCuda(failing, status))
    with pytest.raises(MachineError, match=message) as raised:
        Memory(CudaDevice(), 4096)
    assert hint in raised.value.hint
