"""ONNX Runtime on a CUDA device: whether it can be had here, and a key/value cache that stays there.

Steps bind the same device memory as past and present, so nothing of the cache crosses to the host. Growing, shrinking
and copying rows from slot to slot do, tensor by tensor: ONNX Runtime has no call that copies a part of a tensor.

Not yet run on a device. Tests run the cache with "cpu" as the device, which is all of this code but the CUDA.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import numpy as np

from pixtral_runtime.errors import MachineError, extra_missing

if TYPE_CHECKING:
    pass

CUDA_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""What CUDA has no kernel for, ONNX Runtime gives to the CPU, and copies what it reads."""


def lists_cuda() -> bool:
    """Whether an ONNX Runtime built with CUDA is installed."""
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    return CUDA_PROVIDERS[0] in ort.get_available_providers()


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
